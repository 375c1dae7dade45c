// uPlot in the page's colours and at its width, for a pointer and for a keyboard.

const plots = new Set();
const DASHES = [[], [8, 4], [2, 3], [9, 3, 2, 3], [14, 4], [5, 2]];
const SVG_NAMES = "http://www.w3.org/2000/svg";

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const plot of plots) plot.redraw();
});

const widths = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const plot = [...plots].find((one) => one.root.parentElement === target);
    // The same width is told when it begins to watch: to set it would move the cursor.
    if (plot && target.clientWidth && target.clientWidth !== plot.width) plot.setSize({ width: target.clientWidth, height: plot.height });
  }
});

/** The value of a custom property of the page's styles. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The element with an id. */
export const $ = (id) => document.getElementById(id);

/** An element with a class and a text. */
export function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

/** A series of uPlot: the n-th colour and the m-th dash. */
export function series(label, n, m, more = {}) {
  return {
    label,
    stroke: () => colour(`--c${n % 8}`),
    dash: DASHES[m % DASHES.length],
    width: 1.75,
    points: { show: false },
    ...more,
  };
}

/** What a line looks like, for a legend. */
export function sample(n, m) {
  const svg = document.createElementNS(SVG_NAMES, "svg");
  const line = document.createElementNS(SVG_NAMES, "line");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("viewBox", "0 0 34 8");
  for (const [name, value] of Object.entries({ x1: 0, x2: 34, y1: 4, y2: 4 })) line.setAttribute(name, value);
  line.setAttribute("stroke-dasharray", DASHES[m % DASHES.length].join(" "));
  line.style.stroke = `var(--c${n % 8})`;
  svg.append(line);
  return svg;
}

/** Draws into an element; x and y say how numbers are written. Arrow keys move the cursor. */
export function draw(place, data, { lines, scales, x, y, height, hooks = {}, bands = [], label }) {
  const axis = (values, more) => ({
    stroke: () => colour("--soft"),
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    values: (_, splits) => splits.map((split) => (split === null ? "" : values(split))),
    ...more,
  });
  const plot = new uPlot(
    {
      width: place.clientWidth || 300,
      height,
      scales: { x: { time: false }, ...scales },
      series: [{}, ...lines],
      axes: [axis(x, { size: 26, gap: 4 }), axis(y, { size: 56, gap: 4 })],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
      padding: [10, 10, 0, 0],
      bands,
      hooks,
    },
    data,
    place,
  );
  place.tabIndex = 0;
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", label);
  place.onkeydown = (event) => step(plot, event);
  place.onblur = () => plot.setCursor({ left: -10, top: -10 });
  plots.add(plot);
  widths.observe(place);
  return plot;
}

export function remove(plot) {
  widths.unobserve(plot.root.parentElement);
  plots.delete(plot);
  plot.destroy();
}

/** Puts a plot's cursor at one of its points, or nowhere. */
export function point(plot, index) {
  const there = index !== null && index >= 0 && index < plot.data[0].length;
  plot.setCursor(there ? { left: plot.valToPos(plot.data[0][index], "x"), top: 1 } : { left: -10, top: -10 });
}

function step(plot, event) {
  const last = plot.data[0].length - 1;
  const now = plot.cursor.idx;
  const to = {
    ArrowRight: Math.min((now ?? -1) + 1, last),
    ArrowLeft: Math.max((now ?? last + 1) - 1, 0),
    Home: 0,
    End: last,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  point(plot, to);
}
