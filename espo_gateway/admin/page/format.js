// Numbers as people read them. What is not known is a dash.

const PLAIN = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const THREE = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, minimumSignificantDigits: 3 });
const PERCENT = new Intl.NumberFormat("en", { maximumSignificantDigits: 2, roundingPriority: "lessPrecision" });
const CONSTANT = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const SPACE = "\u202f";

/** 987, 12.3 k, 4.56 M. */
export function count(number) {
  if (number === null || !Number.isFinite(number)) return "–";
  let scaled = Math.round(number);
  if (Math.abs(scaled) < 1000) return PLAIN.format(scaled);
  for (const unit of ["k", "M", "G"]) {
    scaled /= 1000;
    // 999.95 would be rounded to a fourth digit.
    if (Math.abs(scaled) < 999.5 || unit === "G") return THREE.format(scaled) + SPACE + unit;
  }
}

/** The same without zeros at its end. */
export function round(number) {
  return count(number).replace(/(\.\d*?)0+(?=\u202f)/, "$1").replace(/\.(?=\u202f)/, "");
}

/** A share of 1 in percent. */
export function percent(share) {
  if (share === null || !Number.isFinite(share)) return "–";
  return PERCENT.format(100 * share) + SPACE + "%";
}

/** z, a threshold or a probability. */
export function level(number) {
  if (number === null || !Number.isFinite(number)) return "–";
  return number.toFixed(2).replace("-", "−");
}

/** A probability, whose small values matter. */
export function probability(number) {
  if (number === null || !Number.isFinite(number)) return "–";
  return number.toFixed(3);
}

/** A setting, as it was written. */
export function constant(number) {
  return CONSTANT.format(number);
}

/** 12 s, 3 min, 2 h 5 min. */
export function duration(seconds) {
  const s = Math.floor(seconds);
  if (s < 100) return `${s} s`;
  const minutes = Math.floor(s / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}
