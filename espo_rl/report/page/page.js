// Puts the report together from the data in the page.

import { constant, count, percent } from "./format.js";
import { $, element } from "./plots.js";
import { drawCurves, letter } from "./curves.js";
import { TraceView, unpack } from "./trace.js";
import { RolloutTable, result } from "./table.js";

const data = JSON.parse($("data").textContent);

function tile(title, number, note) {
  const made = element("div");
  made.append(element("dt", "", title), element("dd", "number", number), element("dd", "note", note));
  return made;
}

function showRun(run, index) {
  const section = element("div", "run");
  const title = element("h2");
  const mark = letter(data.runs, index);
  if (mark) {
    const box = element("span", "letter", mark);
    box.style.color = `var(--c${index})`;
    title.append(box);
  }
  const facts = [run.model, run.rule && `rule ${run.rule}`, run.seed !== null && `seed ${run.seed}`];
  title.append(run.name, element("small", "", facts.filter(Boolean).join(" · ")));
  const tiles = element("dl", "tiles");
  const of = run.planned ? `of ${run.planned} steps` : "steps";
  const start = run.before === null ? "training rollouts" : `${percent(run.before)} before`;
  const accuracy = run.after ?? (run.before === null ? run.training : null);
  const width = run.half_width ? ` ± ${count(run.half_width)}` : "";
  const audit = run.audited
    ? `${run.audited_correct} of ${run.audited} audited; 95 %: ${percent(run.false_positives_low)}–${percent(run.false_positives_high)}`
    : "nothing was audited";
  const saved = run.saved === null ? "saved: unknown"
    : run.saved ? `≈ ${percent(run.saved)} saved of ${count(run.without)}${width}` : "nothing saved";
  tiles.append(
    tile("Steps", String(run.steps), of),
    tile("Accuracy", percent(accuracy), start),
    tile("Tokens sampled", count(run.tokens), saved),
    tile("Stop share", percent(run.stop_share), run.ended ? "while stopping was on" : "in the last step"),
    tile("Right rollouts lost", percent(run.right_lost), run.ended ? "by the audits" : "known when the run has ended"),
    tile("False positives", percent(run.false_positives), audit),
  );
  section.append(title, tiles);
  return section;
}

function showRollouts(found) {
  const names = Object.keys(found.columns);
  const total = names.length ? found.columns[names[0]].length : 0;
  $("no-rollouts").hidden = total > 0;
  $("browser").hidden = total === 0;
  if (!total) return;
  const said = [data.runs.length > 1 ? `of ${data.runs[0].name}:` : "", `${count(total)}`];
  if (total < found.total) {
    const all = found.audited === found.auditedTotal ? "all" : `${count(found.audited)}`;
    said.push(`of ${count(found.total)}, ${all} of the ${count(found.auditedTotal)} audited ones and others at random`);
  }
  if (found.longest) said.push(`· at most ${count(found.longest)} tokens of each`);
  $("chosen").textContent = said.filter(Boolean).join(" ");
  const rows = Array.from({ length: total }, (_, id) => ({
    id,
    ...Object.fromEntries(names.map((name) => [name, found.columns[name][id]])),
  }));
  const view = new TraceView(found.pieces);
  let wanted = null;
  const table = new RolloutTable(rows, async (row) => {
    wanted = row;
    const trace = await unpack(found.traces[row.id]);
    // Another may have been chosen meanwhile.
    if (wanted === row) show(view, row, found.gates[row.gate], trace);
  });
  $("previous").addEventListener("click", () => table.go(-1));
  $("next").addEventListener("click", () => table.go(1));
  $("table").tBodies[0].addEventListener("click", () => $("rollout").focus({ preventScroll: true }));
  table.select((rows.find((row) => row.end === "early_stop" && row.audited) ?? rows[0]).id);
}

function show(view, row, gate, trace) {
  $("rollout").hidden = false;
  const ends = row.end === "early_stop" ? `stopped at token ${row.kept}` : `${row.tokens} tokens`;
  $("rollout-title").textContent = `Rollout ${row.id + 1}, step ${row.step}: ${ends}`;
  const [sign, words] = result(row);
  const facts = {
    Result: `${sign} ${words}`,
    Expected: row.answer || "–",
    Reward: constant(row.reward),
    Tokens: `${row.kept} kept of ${row.tokens}`,
    Overshoot: String(row.overshoot),
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => {
      const fact = element("div");
      fact.append(element("dt", "", name), element("dd", "", value));
      return fact;
    }),
  );
  $("prompt").textContent = row.prompt;
  view.show(row, gate, trace);
  $("rollout").dataset.id = row.id;
}

$("made").textContent = data.made;
document.title = `${data.runs.map((run) => run.name).join(", ")} · ESPO report`;
$("runs").append(...data.runs.map(showRun));
drawCurves($("curves"), data.panels, data.runs);
showRollouts(data.rollouts);
document.body.dataset.state = "ready";
