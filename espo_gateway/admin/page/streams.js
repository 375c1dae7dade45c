// The table of running streams: a row each, with the line that its snapshots make.

import { drawSparkline, sparkline } from "./charts.js";
import { count, duration, level, probability } from "./format.js";

/** Snapshots a line remembers: a minute. */
const POINTS = 120;
/** Milliseconds that an ended stream stays to be read. */
const STAYS = { early_stop: 6000, completed: 1500, length: 1500, aborted: 1500 };
const MOST_ENDED = 12;

export class Streams {
  constructor() {
    this.table = document.getElementById("streams");
    this.body = this.table.tBodies[0];
    this.empty = document.getElementById("empty");
    this.legend = document.getElementById("legend");
    this.rows = new Map();
    this.seen = new Set(); // ended ones that have had their row
  }

  clear() {
    this.rows.clear();
    this.seen.clear();
    this.body.replaceChildren();
  }

  update(snapshot, now) {
    const running = new Set();
    for (const stream of snapshot.streams.sort((a, b) => b.age - a.age || a.id - b.id)) {
      running.add(stream.id);
      this.row(stream).show(stream);
    }
    const told = new Set(snapshot.ended.map((stream) => stream.id));
    for (const stream of snapshot.ended) {
      const known = this.rows.get(stream.id);
      if (this.seen.has(stream.id) || !(known || stream.end === "early_stop")) continue;
      this.seen.add(stream.id);
      const row = known ?? this.row(stream);
      row.show(stream);
      row.end(stream, now);
    }
    for (const id of this.seen) if (!told.has(id) && !this.rows.has(id)) this.seen.delete(id);
    this.tidy(running, now);
    this.table.hidden = this.legend.hidden = this.rows.size === 0;
    this.empty.hidden = this.rows.size > 0;
  }

  row(stream) {
    let row = this.rows.get(stream.id);
    if (!row) {
      row = new Row();
      this.rows.set(stream.id, row);
      this.body.append(row.element);
    }
    return row;
  }

  tidy(running, now) {
    const ended = [];
    for (const [id, row] of this.rows) {
      if (row.until !== null ? now >= row.until : !running.has(id)) this.drop(id, row);
      else if (row.until !== null) ended.push([id, row]);
    }
    for (const [id, row] of ended.slice(0, -MOST_ENDED)) this.drop(id, row);
  }

  drop(id, row) {
    row.element.remove();
    this.rows.delete(id);
  }
}

class Row {
  constructor() {
    this.points = [];
    this.until = null;
    this.cut = null;
    this.element = document.createElement("tr");
    const head = this.cell("", "th");
    head.scope = "row";
    this.name = part(head, "name");
    this.state = part(head, "state");
    this.tokens = this.cell("n");
    this.age = this.cell("n wide");
    this.spark = sparkline();
    this.cell("chart").append(this.spark.svg);
    this.level = this.cell("n");
    this.threshold = this.cell("n wide");
    this.other = this.cell("n wide");
  }

  cell(classes, kind = "td") {
    const cell = document.createElement(kind);
    if (classes) cell.className = classes;
    this.element.append(cell);
    return cell;
  }

  show(stream) {
    const { measure } = stream;
    const format = measure === "value" ? probability : level;
    const now = measure === "value" ? stream.value : stream.z;
    // Nothing is watched after a decision, though in shadow the stream goes on.
    const decided = stream.cut !== null && this.cut !== null;
    if (stream.tokens && !decided) this.points.push({ level: now, threshold: stream.threshold });
    if (this.points.length > POINTS) this.points.shift();
    this.cut = stream.cut;
    this.element.className = stream.cut === null ? "" : "would";
    write(this.name, stream.name || "waiting");
    this.name.title = [stream.name, stream.model].filter(Boolean).join(" · ");
    write(this.state, this.describe(stream));
    write(this.tokens, count(stream.tokens));
    write(this.age, duration(stream.age));
    write(this.level, stream.tokens ? format(now) : "–");
    write(this.threshold, format(stream.threshold));
    write(this.other, measure === "value" ? level(stream.z) : probability(stream.value));
    if (this.points.length) drawSparkline(this.spark, this.points, measure);
    const against = stream.threshold === null ? "" : ` against ${format(stream.threshold)}`;
    this.spark.svg.setAttribute("aria-label", `${format(now)}${against}`);
  }

  describe(stream) {
    if (!stream.tokens) return "no token yet";
    const choice = stream.index > 0 ? `choice ${stream.index}` : "";
    let mode = "";
    if (stream.mode === "shadow") {
      mode = stream.cut === null ? "shadow" : `shadow: would stop at token ${count(stream.cut)}`;
    }
    return [mode, choice, stream.model].filter(Boolean).join(" · ");
  }

  end(stream, now) {
    const stopped = stream.end === "early_stop";
    this.element.className = stopped ? "ended stopped" : "ended";
    const how = { completed: "completed", length: "at its length limit", aborted: "aborted" };
    write(this.state, stopped ? `stopped at token ${count(stream.cut)}` : how[stream.end]);
    this.until = now + STAYS[stream.end];
  }
}

function part(parent, name) {
  const element = document.createElement("span");
  element.className = name;
  parent.append(element);
  return element;
}

/** Only ever as text: names come from outside. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
