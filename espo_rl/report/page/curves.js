// The curves of all runs, a plot for each panel.

import { constant, count, percent, round } from "./format.js";
import { colour, draw, element, sample, series } from "./plots.js";

const HEIGHT = 190;
const UNITS = {
  share: percent,
  count,
  seconds: (seconds) => `${constant(Number(seconds.toPrecision(3)))}\u202fs`,
  number: small,
};
/** As an axis writes them. */
const AXES = { ...UNITS, count: round };

/** A number whose size is not known beforehand. */
function small(number) {
  const tiny = number !== 0 && Math.abs(number) < 1e-3;
  return (tiny ? number.toExponential(1) : constant(number)).replace("-", "−").replace("e-", "e−");
}

/** A run's letter, where there are several. */
export function letter(runs, run) {
  return runs.length > 1 ? String.fromCharCode(65 + run) : "";
}

export function drawCurves(place, panels, runs) {
  for (const panel of panels) {
    const figure = element("figure");
    figure.id = `panel-${panel.id}`;
    place.append(figure);
    drawPanel(figure, panel, runs);
  }
}

function drawPanel(figure, panel, runs) {
  // A run is told by its colour, the lines of one run by their dashes; alone they have both.
  const numbers = new Map();
  const styles = panel.lines.map((line) => {
    if (!numbers.has(line.label)) numbers.set(line.label, numbers.size);
    const dash = numbers.get(line.label);
    return [runs.length > 1 ? line.run : dash, dash];
  });
  const names = panel.lines.map((line) => `${letter(runs, line.run)} ${line.label}`.trim());
  const write = UNITS[panel.unit];
  const { keys, show } = legend(panel, names, styles, write);
  figure.append(caption(panel), keys);
  const place = element("div", "plot");
  figure.append(place);

  const tables = panel.lines.map(({ x, y, low, high }) => (low.length ? [x, y, low, high] : [x, y]));
  const data = uPlot.join(tables);
  const lines = [];
  const bands = [];
  const bars = [];
  const shown = [];
  panel.lines.forEach((line, i) => {
    const [n, m] = styles[i];
    const points = { show: line.points || line.x.length < 2, size: 7, fill: () => colour(`--c${n % 8}`) };
    lines.push(series(names[i], n, m, { points, spanGaps: line.points }));
    const at = lines.length;
    shown.push(at);
    if (!line.low.length) return;
    lines.push({ stroke: "transparent", points: { show: false } }, { stroke: "transparent", points: { show: false } });
    if (line.points) bars.push([at, n]);
    else bands.push({ series: [at + 2, at + 1], fill: () => colour(`--c${n % 8}`) + "2b" });
  });
  const x = panel.x === "tokens" ? (tokens) => round(tokens) : (at) => (Number.isInteger(at) ? String(at) : "");
  draw(place, data, {
    lines,
    bands,
    scales: { y: { range: (_, low, high) => range(panel.unit, low, high) } },
    x,
    y: AXES[panel.unit],
    height: HEIGHT,
    hooks: {
      setCursor: [(plot) => show(plot, shown, plot.cursor.idx)],
      draw: [(plot) => intervals(plot, bars), (plot) => letters(plot, panel, shown, runs, styles)],
    },
    label: spoken(panel, names, write),
  });
}

function caption(panel) {
  const made = element("figcaption", "", panel.title);
  const details = element("details");
  details.append(element("summary", "", "what is this?"), element("p", "", panel.note));
  made.append(details);
  return made;
}

/** A key for each line, with its value where the cursor is, else its last one. */
function legend(panel, names, styles, write) {
  const keys = element("ul", "keys");
  const outputs = names.map((name, i) => {
    const key = element("li");
    const output = element("output");
    key.append(sample(...styles[i]), name, output);
    keys.append(key);
    return output;
  });
  const where = element("li", "where");
  keys.append(where);
  const last = (values) => values.findLast((value) => value !== null) ?? null;
  const say = (value) => (value === null || value === undefined ? "–" : write(value));
  const show = (plot, shown, index) => {
    const known = index !== null && index !== undefined;
    outputs.forEach((output, i) => {
      const value = known ? plot.data[shown[i]][index] : last(panel.lines[i].y);
      output.textContent = say(value);
    });
    where.textContent = known ? at(panel, plot.data[0][index]) : "last";
  };
  outputs.forEach((output, i) => (output.textContent = say(last(panel.lines[i].y))));
  where.textContent = "last";
  return { keys, show };
}

function at(panel, x) {
  return panel.x === "tokens" ? `${count(x)} tokens` : `step ${x}`;
}

function range(unit, low, high) {
  if (low === null || high === null) return [0, 1];
  const zero = unit === "share" || unit === "count" || unit === "seconds";
  const least = zero ? Math.min(0, low) : low;
  const room = (high - least || Math.abs(high) || 1) * 0.06;
  return [zero && least === 0 ? 0 : least - room, high + room];
}

/** Intervals of points that stand alone. */
function intervals(plot, bars) {
  const { ctx, data } = plot;
  ctx.save();
  ctx.setLineDash([]);
  ctx.lineWidth = 1.5 * devicePixelRatio;
  for (const [line, n] of bars) {
    ctx.strokeStyle = colour(`--c${n % 8}`);
    data[line].forEach((_, i) => {
      const [low, high] = [data[line + 1][i], data[line + 2][i]];
      if (low === null || low === undefined || high === null) return;
      const x = plot.valToPos(data[0][i], "x", true);
      ctx.beginPath();
      ctx.moveTo(x, plot.valToPos(low, "y", true));
      ctx.lineTo(x, plot.valToPos(high, "y", true));
      ctx.stroke();
    });
  }
  ctx.restore();
}

/** A run's letter at the end of its lines. */
function letters(plot, panel, shown, runs, styles) {
  if (runs.length < 2) return;
  const { ctx, data } = plot;
  ctx.save();
  ctx.font = `600 ${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textBaseline = "alphabetic";
  panel.lines.forEach((line, i) => {
    const end = data[shown[i]].findLastIndex((value) => value !== null && value !== undefined);
    if (end < 0) return;
    ctx.fillStyle = colour(`--c${styles[i][0] % 8}`);
    const x = plot.valToPos(data[0][end], "x", true);
    const y = plot.valToPos(data[shown[i]][end], "y", true) - 5 * devicePixelRatio;
    ctx.textAlign = x < plot.bbox.left + 20 * devicePixelRatio ? "left" : "right";
    ctx.fillText(letter(runs, line.run), x, y);
  });
  ctx.restore();
}

/** A plot in words, for who does not see it. */
function spoken(panel, names, write) {
  const lines = panel.lines.map((line, i) => {
    const known = line.y.filter((value) => value !== null);
    return `${names[i]} from ${write(known[0])} to ${write(known[known.length - 1])}`;
  });
  return `${panel.title}: ${lines.join("; ")}`;
}
