// One rollout: its tokens by regret, and under it z and V against the threshold.

import { constant, count, level, probability } from "./format.js";
import { $, colour, draw, element, point, remove, sample, series } from "./plots.js";

/** Where the classes of regret begin, in nats. */
const CLASSES = [0, 0.1, 0.5, 1, 2, 4];

/** Of a line that is known here and there. */
const POINTS = { points: { show: true, size: 5 }, spanGaps: true };

/** The numbers of a rollout, unpacked: arrays over the tokens that are shown. */
export async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const trace = await new Response(stream).json();
  for (const name of ["threshold", "value"]) {
    if (!Array.isArray(trace[name])) trace[name] = trace.g.map(() => trace[name]);
  }
  return trace;
}

export class TraceView {
  constructor(pieces) {
    this.pieces = pieces;
    this.plots = [];
    this.spans = [];
    this.active = null;
    this.pointing = false;
    const box = $("tokens");
    // Not pointerover: it comes before the mouseleave of a plot, which would unmark the token.
    box.addEventListener("mouseover", (event) => {
      const at = this.spans.indexOf(event.target);
      if (at >= 0) this.mark(at);
    });
    box.addEventListener("focus", () => this.mark(this.active ?? 0));
    box.addEventListener("keydown", (event) => this.move(event));
    explainScale();
  }

  /** Shows a rollout: a row of the table, its gate, its trace. */
  show(row, gate, trace) {
    Object.assign(this, { row, gate, trace, active: null });
    for (const plot of this.plots) remove(plot);
    $("plots").replaceChildren();
    this.plots = [];
    this.words();
    this.draw();
    $("about").textContent = about(row, gate, trace);
    this.mark(null);
  }

  words() {
    const box = $("tokens");
    const { row, trace } = this;
    this.spans = [];
    if (trace.text !== undefined) {
      box.replaceChildren(trace.text);
      return;
    }
    const made = trace.pieces.map((piece, i) => {
      const text = this.pieces[piece];
      const after = row.end === "early_stop" && trace.start + i >= row.kept;
      const span = element("span", classes(trace.g[i], after, text === null));
      span.textContent = text === null ? "◌" : text.replaceAll("\n", "↵\n") || "∅";
      return span;
    });
    this.spans = made;
    const all = [...made];
    if (row.end === "early_stop") {
      const beyond = row.tokens > row.kept ? "; what follows was generated for the audit only" : "";
      all.splice(row.kept - trace.start, 0, element("span", "cut", `stopped at token ${row.kept}${beyond}`));
    }
    box.replaceChildren(...all);
  }

  draw() {
    const { row, gate, trace } = this;
    const x = trace.g.map((_, i) => trace.start + i + 1);
    const cut = row.end === "early_stop" ? row.kept : null;
    const onZ = gate.compared === "z";
    const values = trace.value.some((value) => value !== null);
    this.plot("z", "z, the smoothed regret", x, [
      ["z", trace.z],
      ...(onZ ? [["threshold", trace.threshold]] : []),
    ], cut, level, values ? 150 : 190);
    this.drawProbes(x, cut);
    if (!values) return;
    this.plot("value", "V, the estimated chance of success", x, [
      ["V", trace.value],
      ...(gate.compared === "value" ? [["p*, under which it stops", trace.threshold]] : []),
    ], cut, constant, 130, [0, 1]);
  }

  /** What answer probes said, at the tokens where they were asked. */
  drawProbes(x, cut) {
    const { probes, start } = this.trace;
    if (!probes) return;
    const names = ["reference answer, first token", "reference answer", "the policy's own word"];
    const lines = names.map((name, i) => {
      const said = x.map(() => null);
      for (const probe of probes) said[probe[0] - start - 1] = probe[1 + i];
      return [name, said];
    });
    this.plot("probes", "Log-likelihood by answer probes", x, lines, cut, level, 150);
  }

  plot(id, title, x, lines, cut, write, height, bounds) {
    const figure = element("figure");
    figure.id = `trace-${id}`;
    const keys = element("ul", "keys");
    lines.forEach(([name], i) => {
      const key = element("li");
      key.append(sample(i, i), name);
      keys.append(key);
    });
    const place = element("div", "plot");
    figure.append(element("figcaption", "", title), keys, place);
    $("plots").append(figure);
    const plot = draw(place, [x, ...lines.map(([, values]) => values)], {
      lines: lines.map(([name, values], i) => series(name, i, i, values.includes(null) ? POINTS : {})),
      scales: { y: { range: (_, low, high) => bounds ?? padded(low, high) } },
      x: (at) => (Number.isInteger(at) ? String(at) : ""),
      y: write,
      height,
      hooks: {
        drawAxes: [(drawn) => zone(drawn, cut)],
        draw: [(drawn) => cutLine(drawn, cut)],
        setCursor: [(moved) => this.pointed(moved.cursor.idx)],
      },
      label: `${title}, of ${count(x.length)} tokens${cut ? `; stopped at token ${cut}` : ""}`,
    });
    this.plots.push(plot);
  }

  pointed(index) {
    if (this.pointing) return;
    this.mark(index ?? null);
    const [box, span] = [$("tokens"), this.spans[index]];
    // Only the box is scrolled: the page under the pointer stays.
    if (span) box.scrollTop = span.offsetTop - box.clientHeight / 2;
  }

  /** Marks a token in the text and in the plots; null: none. */
  mark(index) {
    if (this.active !== null) this.spans[this.active]?.classList.remove("active");
    if (index !== null) this.spans[index]?.classList.add("active");
    this.active = index;
    this.pointing = true;
    for (const plot of this.plots) point(plot, index);
    this.pointing = false;
    this.read(index);
  }

  read(index) {
    const { trace, gate } = this;
    if (index === null) {
      $("readout").textContent = trace.g.length ? "Point at a token or at the plots to read it." : "No token.";
      return;
    }
    const text = trace.pieces ? this.pieces[trace.pieces[index]] : undefined;
    const name = element("b", "", text === null ? "part of a character" : text === undefined ? "" : JSON.stringify(text));
    const said = [
      `regret g ${level(trace.g[index])}`,
      `z ${level(trace.z[index])}`,
      ...(gate.compared === "z" ? [`threshold ${level(trace.threshold[index])}`] : []),
      ...(trace.value[index] === null ? [] : [`V ${probability(trace.value[index])}`]),
      ...(gate.compared === "value" ? [`p* ${constant(trace.threshold[index])}`] : []),
    ];
    $("readout").replaceChildren(`token ${trace.start + index + 1} `, name, ` · ${said.join(" · ")}`);
  }

  move(event) {
    const last = this.trace.g.length - 1;
    const now = this.active ?? -1;
    const to = {
      ArrowRight: now + 1, ArrowDown: now + 10, PageDown: now + 100,
      ArrowLeft: now - 1, ArrowUp: now - 10, PageUp: now - 100,
      Home: 0, End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.mark(Math.min(Math.max(to, 0), last));
    this.spans[this.active]?.scrollIntoView({ block: "nearest" });
  }
}

function classes(regret, after, part) {
  const rank = regret === null ? "missing" : `r${CLASSES.findLastIndex((from) => regret >= from)}`;
  return ["t", rank, after ? "after" : "", part ? "part" : ""].filter(Boolean).join(" ");
}

function explainScale() {
  $("scale").append(element("li", "", "regret g in nats:"));
  CLASSES.forEach((from, i) => {
    const key = element("li");
    const to = CLASSES[i + 1];
    key.append(element("span", `t r${i}`, "ab"), to ? `${from}–${to}` : `over ${from}`);
    $("scale").append(key);
  });
  for (const [name, text, said] of [["t missing", "ab", "no logprob"], ["t after", "ab", "after the cut"]]) {
    const key = element("li");
    key.append(element("span", name, text), said);
    $("scale").append(key);
  }
}

/** What there is to know before reading the lines. */
function about(row, gate, trace) {
  const said = [`Rule ${gate.rule}, gate version ${gate.version}.`];
  if (gate.rule === "none") said.push("Nothing could be stopped in this step.");
  else if (gate.compared === null) said.push("This rule compares neither z nor V, so no threshold is drawn.");
  if (gate.source === "critic") said.push("V came from a critic and is not recorded: the threshold is the least it could be, β·ε.");
  if (trace.text !== undefined) said.push("Tokens have no text here, as the model's tokenizer was not found when the report was made; the text is shown whole.");
  if (trace.start || trace.g.length < row.tokens) {
    said.push(`Tokens ${trace.start + 1} to ${trace.start + trace.g.length} of ${row.tokens} are shown.`);
  }
  return said.join(" ");
}

function padded(low, high) {
  if (low === null) return [0, 1];
  const room = (high - low || 1) * 0.08;
  return [low - room, high + room];
}

function cutAt(plot, cut) {
  return plot.valToPos(cut + 0.5, "x", true);
}

/** The part after the cut, hatched as its tokens are. */
function zone(plot, cut) {
  const { ctx, bbox } = plot;
  const left = cut === null ? Infinity : Math.max(cutAt(plot, cut), bbox.left);
  const right = bbox.left + bbox.width;
  if (left >= right) return;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, bbox.top, right - left, bbox.height);
  ctx.clip();
  ctx.strokeStyle = colour("--hatch");
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.beginPath();
  for (let x = left - bbox.height; x < right; x += 8 * devicePixelRatio) {
    ctx.moveTo(x, bbox.top + bbox.height);
    ctx.lineTo(x + bbox.height, bbox.top);
  }
  ctx.stroke();
  ctx.restore();
}

function cutLine(plot, cut) {
  if (cut === null) return;
  const { ctx, bbox } = plot;
  // At the last token there is no room for it beside.
  const x = Math.min(cutAt(plot, cut), bbox.left + bbox.width - devicePixelRatio);
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour("--stop");
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.setLineDash([]);
  ctx.textBaseline = "alphabetic";
  ctx.beginPath();
  ctx.moveTo(x, bbox.top);
  ctx.lineTo(x, bbox.top + bbox.height);
  ctx.stroke();
  ctx.font = `600 ${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = "right";
  const wide = ctx.measureText("cut").width + 6 * devicePixelRatio;
  const high = 14 * devicePixelRatio;
  ctx.fillRect(x - wide, bbox.top, wide, high);
  ctx.fillStyle = colour("--paper");
  ctx.fillText("cut", x - 3 * devicePixelRatio, bbox.top + high - 3 * devicePixelRatio);
  ctx.restore();
}
