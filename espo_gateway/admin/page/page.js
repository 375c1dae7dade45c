// Asks for a snapshot twice a second while somebody looks, and shows it.

import { constant, count, duration, percent } from "./format.js";
import { History } from "./history.js";
import { Streams } from "./streams.js";

const INTERVAL = 500;
const RETRY = 1000;
/** Milliseconds without an answer after which the gateway is as good as gone. */
const TIMEOUT = 4000;
const PAUSED = "Paused while hidden";

const streams = new Streams();
const history = new History();
let started = null;
let lost = null;
let timer = null;
let asking = false;

const $ = (id) => document.getElementById(id);

function write(id, text) {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
}

function state(name, text) {
  document.body.dataset.state = name;
  write("status", text);
}

async function poll() {
  if (asking) return;
  clearTimeout(timer);
  asking = true;
  const snapshot = await ask();
  asking = false;
  // Set before it is shown: a snapshot that cannot be shown must not be the last.
  if (!document.hidden) timer = setTimeout(poll, snapshot ? INTERVAL : RETRY);
  if (snapshot) show(snapshot);
}

/** A snapshot, or null when there is none to be had; the status says why. */
async function ask() {
  let problem = "No answer from the gateway";
  try {
    const response = await fetch("live", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
    if (response.ok) {
      const snapshot = await response.json();
      lost = null;
      state(document.hidden ? "paused" : "live", document.hidden ? PAUSED : "Live");
      return snapshot;
    }
    if (response.status === 401 || response.status === 403) {
      state("denied", "Not allowed: reload the page and sign in");
      return null;
    }
    problem = `Only status ${response.status} from the gateway`;
  } catch {
    // No connection, no answer in time, or half of one.
  }
  lost ??= new Date().toLocaleTimeString();
  state("gone", `${problem} since ${lost}. Trying again`);
  return null;
}

function show(snapshot) {
  if (started !== snapshot.started) {
    // Another gateway: its streams and sums are its own.
    streams.clear();
    history.clear();
    started = snapshot.started;
  }
  tiles(snapshot);
  counts(snapshot.totals);
  servers(snapshot.servers);
  streams.update(snapshot, performance.now());
  history.push(snapshot.time, snapshot.totals, snapshot.tokens_per_second);
}

function tiles({ gate, totals, running, streams: shown, queued, tokens_per_second: rate, time }) {
  write("running", count(running));
  write("running-note", queued ? `${count(queued)} more are queued` : "none queued");
  write("shown", running > shown.length ? `the longest ${shown.length} of ${count(running)}` : "");
  const whole = totals.completed + totals.length + totals.early_stop;
  write("share", percent(totals.stop_share));
  const shadow = totals.shadow_stops ? `, ${count(totals.shadow_stops)} in shadow` : "";
  write("share-note", whole ? `${count(totals.early_stop)} of ${count(whole)}${shadow}` : "nothing has ended yet");
  write("rate", count(rate));
  write("rate-note", `${count(totals.tokens)} so far`);
  const saved = totals.saved_estimate;
  write("saved", totals.early_stop ? `≈\u202f${count(saved)}` : "–");
  const note = totals.shadow_saved ? `${count(totals.shadow_saved)} in shadow` : "no stop yet";
  write("saved-note", totals.early_stop ? `${percent(saved / (saved + totals.tokens))}, estimated` : note);
  write("rule", gate.rule);
  write("rule-note", constants(gate));
  write("version", String(gate.version));
  write("version-note", `up ${duration(time - started)}`);
  const value = ["value-only", "success-probability"].includes(gate.rule);
  write("level-name", value ? "V" : "z");
  write("legend-level", value ? "V" : "z");
  write("other-name", value ? "z" : "V");
  write("level-title", value ? "V and its threshold" : "z and its threshold");
}

function constants(gate) {
  const source = gate.value ? `, V ${gate.value}` : "";
  switch (gate.rule) {
    case "none":
      return "nothing is stopped";
    case "value-gated":
      return `β ${constant(gate.beta)}, ε ${constant(gate.epsilon)}${source}`;
    case "value-only":
    case "success-probability":
      return `p* ${constant(gate.p_star)}${source}`;
    case "confidence":
      return `confidence ${constant(gate.confidence)}`;
    case "random":
      return `hazard ${constant(gate.hazard)}`;
    default:
      return `β ${constant(gate.beta)}`;
  }
}

function counts(totals) {
  for (const name of ["requests", "unmonitored", "disconnects", "errors"]) write(name, count(totals[name]));
  const stops = totals.early_stop;
  write("overshoot", stops ? `${(totals.overshoot / stops).toFixed(1)} tokens` : "–");
  const watched = totals.critic_asked + totals.critic_avoided;
  $("critic-count").hidden = watched === 0;
  write("critic", `${count(totals.critic_asked)} of ${count(watched)}`);
}

function servers(list) {
  const body = $("servers").tBodies[0];
  while (body.rows.length > list.length) body.deleteRow(-1);
  list.forEach((server, i) => {
    const row = body.rows[i] ?? newServer(body);
    const [url, health, inFlight, retries] = row.cells;
    const [mark, text] = health.children;
    const [sign, words, bad] = serverState(server);
    for (const [element, said] of [
      [url, server.url],
      [mark, sign],
      [text, words],
      [inFlight, count(server.in_flight)],
      [retries, count(server.retries)],
    ]) {
      if (element.textContent !== said) element.textContent = said;
    }
    health.className = bad ? "bad" : "";
  });
}

function serverState({ healthy, breaker }) {
  if (breaker === "open") return ["■", "left alone after failures", true];
  if (breaker !== "closed") return ["◐", "being tried again", true];
  return healthy ? ["●", "healthy", false] : ["▲", "does not answer", true];
}

function newServer(body) {
  const row = body.insertRow();
  row.insertCell().className = "url";
  const health = row.insertCell();
  for (const name of ["mark", "words"]) {
    const span = document.createElement("span");
    span.className = name;
    if (name === "mark") span.setAttribute("aria-hidden", "true");
    health.append(span);
  }
  row.insertCell().className = "n";
  row.insertCell().className = "n";
  return row;
}

const base = new URL("../v1/completions", location.href);
$("example").textContent =
  `curl -N ${base.href} -H 'Content-Type: application/json' \\\n` +
  `  -d '{"model": "MODEL", "prompt": "Once", "max_tokens": 500, "stream": true}'`;

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (document.hidden) state("paused", PAUSED);
  else poll();
});
poll();
