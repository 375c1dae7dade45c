// The last minutes of two numbers, from successive snapshots.

import { ceiling, paths, polyline } from "./charts.js";
import { duration, percent, round } from "./format.js";

/** The time shown grows from the shortest to the longest. */
const SHORTEST = 60;
const LONGEST = 300;
const EVERY = 1;
/** The stop share is of the choices that ended within so many seconds. */
const SHARE_SECONDS = 30;
const WIDTH = 300;
const HEIGHT = 60;

export class History {
  constructor() {
    this.samples = [];
    this.charts = {};
    for (const name of ["share", "rate"]) {
      const svg = document.getElementById(`${name}-chart`);
      const [line] = paths(svg, "level");
      this.charts[name] = { svg, line, top: document.getElementById(`${name}-top`) };
    }
  }

  clear() {
    this.samples = [];
  }

  /** Take a snapshot's totals at a time in seconds. */
  push(time, totals, rate) {
    const last = this.samples[this.samples.length - 1];
    if (last && time - last.time < EVERY) return;
    const whole = totals.completed + totals.length + totals.early_stop;
    const sample = { time, whole, stopped: totals.early_stop, rate, share: null };
    // A pause is a gap: no line is drawn over what nobody has seen.
    if (last && time - last.time > 5 * EVERY) {
      this.samples.push({ ...sample, time: last.time + EVERY, rate: null, gap: true });
    }
    const before = this.samples.find((s) => !s.gap && time - s.time <= SHARE_SECONDS);
    if (before && whole > before.whole) {
      sample.share = (sample.stopped - before.stopped) / (whole - before.whole);
    }
    this.samples.push(sample);
    while (time - this.samples[0].time > LONGEST) this.samples.shift();
    this.draw(time);
  }

  draw(now) {
    this.span = Math.max(SHORTEST, now - this.samples[0].time);
    for (const element of document.querySelectorAll(".since")) {
      element.textContent = `${duration(this.span)} ago`;
    }
    this.line("share", now, "Stop share", percent, 0.05);
    this.line("rate", now, "Tokens per second", round, 10);
  }

  line(name, now, title, format, least) {
    const { svg, line, top } = this.charts[name];
    const known = this.samples.map((s) => s[name]).filter((y) => y !== null);
    const highest = ceiling(Math.max(least, ...known));
    const points = this.samples.map((s) => [
      WIDTH * (1 - (now - s.time) / this.span),
      s[name] === null ? null : HEIGHT - 1 - (HEIGHT - 3) * (s[name] / highest),
    ]);
    line.setAttribute("d", polyline(points));
    top.textContent = known.length ? format(highest) : "";
    const last = known.length ? format(known[known.length - 1]) : "not known yet";
    const peak = known.length ? `, highest ${format(Math.max(...known))}` : "";
    svg.setAttribute("aria-label", `${title} over the last ${duration(this.span)}: now ${last}${peak}`);
  }
}
