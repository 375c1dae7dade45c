// The table of rollouts: filtered, sorted, a page at a time, so that thousands stay fast.

import { count } from "./format.js";
import { $, element } from "./plots.js";

const PAGE = 15;
const stopped = (row) => row.end === "early_stop";
const mistaken = (row) => stopped(row) && row.correct === true;

const SHOW = {
  "all": () => true,
  "stopped": stopped,
  "false positives": mistaken,
  "audited": (row) => row.audited,
  "right": (row) => row.correct === true,
  "wrong": (row) => row.correct === false,
  "not stopped": (row) => !stopped(row),
  "cut by max_tokens": (row) => row.end === "length",
  "failed": (row) => row.end === "error",
};
/** Columns: key, header, is it a number, shown on a wide page only. */
const COLUMNS = [
  ["id", "Rollout", false, false],
  ["step", "Step", false, false],
  ["prompt", "Problem", false, false],
  ["result", "Result", false, false],
  ["tokens", "Tokens", true, false],
  ["kept", "Kept", true, true],
  ["overshoot", "Overshoot", true, true],
];
const SORTS = [
  ["in order", "id", false],
  ["longest", "tokens", true],
  ["shortest", "tokens", false],
  ["most overshoot", "overshoot", true],
  ["earliest cut", "kept", false],
  ["most kept", "kept", true],
  ["result", "result", false],
  ["newest step", "step", true],
  ["problem", "prompt", false],
];

/** How a rollout ended: a sign and words. */
export function result(row) {
  const ended = row.correct ? ["●", "right"] : ["○", "wrong"];
  if (row.end === "error") return ["×", "failed"];
  if (mistaken(row)) return ["▲", "false positive"];
  if (stopped(row)) return row.audited ? ["■", "stopped, rightly"] : ["■", "stopped"];
  return row.end === "length" ? ["◐", `max_tokens, ${ended[1]}`] : ended;
}

export class RolloutTable {
  constructor(rows, onSelect) {
    this.rows = rows;
    this.onSelect = onSelect;
    this.page = 0;
    this.sorted = ["id", false];
    this.selected = null;
    for (const row of rows) {
      row.result = result(row)[1];
      row.search = `${row.prompt}\n${row.answer}`.toLowerCase();
    }
    this.controls();
    this.update();
  }

  controls() {
    const option = (text, value) => Object.assign(element("option", "", text), { value });
    for (const [name, shows] of Object.entries(SHOW)) {
      $("show").append(option(`${name} (${count(this.rows.filter(shows).length)})`, name));
    }
    const steps = [...new Set(this.rows.map((row) => row.step))].sort((a, b) => a - b);
    $("step").append(option("all", ""), ...steps.map((step) => option(String(step), String(step))));
    SORTS.forEach(([name], i) => $("sort").append(option(name, String(i))));
    for (const id of ["show", "step"]) $(id).addEventListener("change", () => this.update());
    $("text").addEventListener("input", () => this.update());
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("sort").addEventListener("change", () => this.sort(...SORTS[$("sort").value].slice(1)));
    for (const [key, title, numeric, wide] of COLUMNS) {
      const head = element("th", `${numeric ? "n" : ""} ${wide ? "wide" : ""}`.trim());
      const button = Object.assign(element("button", "", title), { type: "button" });
      head.scope = "col";
      head.dataset.key = key;
      // First what one looks for: the most.
      button.addEventListener("click", () => this.sort(key, this.sorted[0] === key ? !this.sorted[1] : numeric));
      head.append(button);
      $("table").tHead.rows[0].append(head);
    }
    $("back").addEventListener("click", () => this.turn(-1));
    $("forward").addEventListener("click", () => this.turn(1));
    $("table").tBodies[0].addEventListener("click", (event) => {
      const line = event.target.closest("tr");
      if (line) this.select(Number(line.dataset.id));
    });
  }

  sort(key, descending) {
    this.sorted = [key, descending];
    const known = SORTS.findIndex(([, by, down]) => by === key && down === descending);
    $("sort").value = known < 0 ? "" : String(known);
    this.update();
  }

  turn(by) {
    this.page += by;
    this.render();
  }

  /** Filter and sort anew. */
  update() {
    const shows = SHOW[$("show").value];
    const step = $("step").value;
    const text = $("text").value.trim().toLowerCase();
    const [key, descending] = this.sorted;
    const sign = descending ? -1 : 1;
    this.found = this.rows.filter(
      (row) => shows(row) && (!step || row.step === Number(step)) && row.search.includes(text),
    );
    this.found.sort((a, b) => sign * (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0) || a.id - b.id);
    this.page = 0;
    this.render();
  }

  render() {
    const pages = Math.max(Math.ceil(this.found.length / PAGE), 1);
    const from = this.page * PAGE;
    const lines = this.found.slice(from, from + PAGE).map((row) => this.line(row));
    $("table").tBodies[0].replaceChildren(...lines);
    for (const head of $("table").tHead.rows[0].cells) {
      head.removeAttribute("aria-sort");
      if (head.dataset.key === this.sorted[0]) head.ariaSort = this.sorted[1] ? "descending" : "ascending";
    }
    $("back").disabled = this.page === 0;
    $("forward").disabled = this.page >= pages - 1;
    const shown = `${from + 1}–${from + lines.length} of ${this.found.length}`;
    $("page").textContent = lines.length ? shown : "no rollout is like that";
    this.neighbours();
  }

  line(row) {
    const line = element("tr");
    line.dataset.id = row.id;
    if (row.id === this.selected) line.ariaCurrent = "true";
    const [sign] = result(row);
    for (const [key, , numeric, wide] of COLUMNS) {
      const cell = element("td", `${numeric ? "n" : ""} ${wide ? "wide" : ""}`.trim());
      if (key === "id") {
        cell.append(Object.assign(element("button", "", String(row.id + 1)), { type: "button" }));
      } else if (key === "result") {
        cell.append(element("span", "sign", sign), row.result);
        cell.classList.toggle("false", mistaken(row));
      } else cell.textContent = String(row[key]).slice(0, 200);
      line.append(cell);
    }
    return line;
  }

  select(id) {
    this.selected = id;
    for (const line of $("table").tBodies[0].rows) {
      line.ariaCurrent = Number(line.dataset.id) === id ? "true" : null;
    }
    this.neighbours();
    this.onSelect(this.rows[id]);
  }

  /** The next one of those that are found, or the one before. */
  go(by) {
    const next = this.found[this.found.findIndex((row) => row.id === this.selected) + by];
    if (!next) return;
    this.page = Math.floor(this.found.indexOf(next) / PAGE);
    this.selected = next.id;
    this.render();
    this.select(next.id);
  }

  neighbours() {
    const at = this.found.findIndex((row) => row.id === this.selected);
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 || at === this.found.length - 1;
  }
}
