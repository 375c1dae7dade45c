// Lines in SVG. Everything is drawn as paths: strokes do not scale, so a dot stays round at any width.

const SVG = "http://www.w3.org/2000/svg";
/** Fewer points than these leave the right of a sparkline empty, so that a young stream grows. */
const SHORTEST = 16;
export const SPARK_WIDTH = 200;
export const SPARK_HEIGHT = 40;

export function paths(svg, ...classes) {
  return classes.map((name) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    svg.append(path);
    return path;
  });
}

/** A sparkline's svg with its paths. */
export function sparkline() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${SPARK_WIDTH} ${SPARK_HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const [zone, threshold, line, now] = paths(svg, "zone", "threshold", "level", "now");
  return { svg, zone, threshold, line, now };
}

const logit = (p) => Math.log(Math.max(p, 1e-6) / Math.max(1 - p, 1e-6));

/** Points are {level, threshold}; measure is "z", which stops above, or "value", which stops below. */
export function drawSparkline(spark, points, measure) {
  const last = points[points.length - 1];
  const scale = measure === "value" ? probabilityScale(last) : regretScale(points, last);
  const step = SPARK_WIDTH / Math.max(points.length - 1, SHORTEST);
  const place = (name) => points.map((p, i) => [2 + i * step * 0.97, scale(p[name])]);
  const levels = points.every((p) => p.level === null) ? [] : place("level");
  spark.line.setAttribute("d", polyline(levels));
  spark.now.setAttribute("d", levels.length ? polyline(levels.slice(-1)) : "");
  const known = last.threshold !== null;
  const bounds = known ? place("threshold") : [];
  if (known) {
    bounds.unshift([0, bounds[0][1]]);
    bounds.push([SPARK_WIDTH, bounds[bounds.length - 1][1]]);
  }
  spark.threshold.setAttribute("d", polyline(bounds));
  const edge = measure === "value" ? SPARK_HEIGHT : 0;
  spark.zone.setAttribute("d", known ? `${polyline(bounds)}V${edge}H0Z` : "");
}

/** The threshold lies at the same height in every row: levels are shown as shares of it. */
function regretScale(points, last) {
  const unit = last.threshold ?? Math.max(1, ...points.map((p) => Math.abs(p.level ?? 0)));
  return (z) => height((z ?? 0) / unit, -0.6, 1.4);
}

/** In log odds: what matters of a probability happens near its ends. */
function probabilityScale(last) {
  const bound = logit(last.threshold);
  return (p) => height(logit(p ?? 0.5), bound - 2, bound + 6);
}

function height(x, low, high) {
  const share = Math.min(Math.max((x - low) / (high - low), 0), 1);
  return 2 + (1 - share) * (SPARK_HEIGHT - 4);
}

/** A line through points [x, y]; where y is null it is broken. A single point is a dot. */
export function polyline(points) {
  let drawn = "";
  let pen = "M";
  let alone = false;
  for (const [x, y] of points) {
    if (y === null) {
      drawn += alone ? "h0" : "";
      alone = false;
      pen = "M";
      continue;
    }
    drawn += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    alone = pen === "M";
    pen = "L";
  }
  return drawn + (alone ? "h0" : "");
}

const NICE = [1, 2, 2.5, 5, 10];

/** The least round number that is no smaller. */
export function ceiling(number) {
  const unit = 10 ** Math.floor(Math.log10(number));
  return unit * NICE.find((nice) => nice * unit >= number * 0.999);
}
