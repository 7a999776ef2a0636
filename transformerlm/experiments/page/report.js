// A report: runs from the data in the page itself. Nothing is asked of anybody.

import { byId, make, say, whole } from "/static/dom.js";
import { chooseAll, fillTable, refresh, showList, showRuns } from "/static/runs_view.js";

const data = JSON.parse(byId("data").textContent);
const byName = new Map(data.runs.map((run) => [run.name, run]));

// Steps are written as differences.
function summed(differences) {
  let step = 0;
  return differences.map((difference) => (step += difference));
}

// Numbers that are not finite are words in JSON.
const numbers = (values) => values.map((value) => (typeof value === "number" ? value : null));
const curveOf = ({ steps, values }) => ({ steps: summed(steps), values: numbers(values) });

const embedded = {
  async fill(lines) {
    const run = byName.get(lines.name);
    if (lines.source.isFull?.has(lines)) return false;
    (lines.source.isFull ??= new WeakSet()).add(lines);
    for (const event of run.events) lines.add(event);
    for (const [step, prompt, text] of run.samples) lines.addSample(step, prompt, text);
    for (const [metric, curve] of Object.entries(run.curves)) {
      lines.curves[metric] = { ...curveOf(curve), means: curve.means && curveOf(curve.means) };
    }
    const { steps, tokens, seconds } = run.clock;
    lines.clock = { steps: [0, ...summed(steps)], tokens: [0, ...numbers(tokens)], seconds: [0, ...numbers(seconds)] };
    lines.now = { step: lines.clock.steps.at(-1), tokens: lines.clock.tokens.at(-1), seconds: lines.clock.seconds.at(-1) };
    return true;
  },
  config: async (name) => ({ config: byName.get(name).config, defaults: data.defaults }),
};

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

// Show the commands that train the runs again, and what to know about them.
function showReproduction() {
  for (const { name, reproduction } of data.runs) {
    const rows = [["Command", reproduction.command], ["As it was typed", reproduction.typed]].filter(([, words]) => words);
    byId("reproduction").append(
      ...(data.runs.length > 1 ? [make("h3", {}, name)] : []),
      ...rows.flatMap(([words, command]) => [make("p", { className: "keys" }, words), make("pre", { tabIndex: 0, role: "group", "aria-label": words }, command)]),
      make("p", {}, reproduction.notes.join(" ")),
    );
  }
}

// Show the tables of facts, a column for each run.
function showFacts() {
  const names = data.runs.map((run) => run.name);
  for (const title of Object.keys(data.runs[0].facts)) {
    const known = data.runs.map((run) => new Map(run.facts[title]));
    const keys = [...new Set(known.flatMap((rows) => [...rows.keys()]))];
    if (!keys.length) continue;
    const head = make("h2", { id: `facts-${byId("facts").children.length}` }, title);
    const table = make("table", { className: "facts" });
    fillTable(table, names, keys.map((key) => [key, ...known.map((rows) => rows.get(key))]));
    byId("facts").append(make("div", { className: "card" }, head,
      make("div", { className: "scrolls", tabIndex: 0, role: "group", "aria-labelledby": head.id }, table)));
  }
}

function showCheckpoints() {
  const rows = data.runs.flatMap((run) => run.checkpoints.map((one) => [run.name, one]));
  byId("checkpoints-card").hidden = !rows.length;
  const heads = ["Run", "Step", "Validation loss", "Size", "sha256 of the weights"];
  byId("checkpoints").replaceChildren(
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map(([name, one]) => {
      const sums = Object.entries(one.sha256).map(([file, sum]) => (file === "model.safetensors" ? sum : `${file} ${sum}`));
      const step = [whole(one.step), ...one.names].join(", ");
      const cells = [name, step, one.val_loss === null ? "–" : one.val_loss.toFixed(4), megabytes(one.bytes)];
      return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)), make("td", { className: "sum" }, sums.join("\n") || "–"));
    })));
}

function showNotes() {
  const notes = data.runs.flatMap((run) => [
    ...(run.samples_left_out ? [`${run.name}: ${whole(run.samples_left_out)} samples are left out of this report.`] : []),
    ...(run.bad_lines ? [`${run.name}: ${whole(run.bad_lines)} lines could not be read.`] : []),
  ]);
  say("runs-status", notes.join(" "));
}

async function begin() {
  document.title = `${data.title} · transformerlm`;
  byId("title").textContent = data.title;
  byId("made").textContent = data.made;
  byId("verdict").textContent = data.verdict.join(" ");
  // Of long runs a curve has the highest and the lowest values of each stretch; what is between them is what one looks for.
  if (data.runs.some((run) => run.curves.loss?.means)) byId("curves").elements.namedItem("smoothing").value = "0.6";
  showRuns(embedded);
  showList(data.runs.map((run) => run.summary));
  const names = data.runs.map((run) => run.name);
  await chooseAll(names);
  await refresh(names);
  showFacts();
  showCheckpoints();
  showReproduction();
  showNotes();
}

begin();
