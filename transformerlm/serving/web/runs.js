// The tab Runs: the runs of a directory, their curves while they train, what they wrote, and how they were configured.

import { ask, askJson, events } from "/static/api.js";
import { Chart, colourOf } from "/static/chart.js";
import { byId, fixed, make, say, setOptions, short, whole } from "/static/dom.js";
import { RunLines, smoothed } from "/static/run_lines.js";

const CHOSEN = "transformerlm.runs";
const TITLES = { loss: "Loss", val_loss: "Validation loss", lr: "Learning rate", grad_norm: "Gradient norm", tokens_per_second: "Tokens a second" };
const X_LABELS = { step: "step", tokens: "tokens", hours: "hours of training", flops: "FLOPs" };
const STATES = { running: "running", finished: "finished", stopped: "stopped", interrupted: "interrupted", failed: "failed", damaged: "damaged" };
const RETRY_MS = 2000;
const MOST = 12;
const form = byId("curves");
const chosen = new Map(); // name -> {lines, colour}
const charts = new Map();
let summaries = [];
let watching = null;
let drawing = 0;
let configOf = "";

// --- the list ---

async function list() {
  summaries = (await askJson("/api/runs")).runs;
  const names = new Set(summaries.map((run) => run.name));
  for (const name of chosen.keys()) if (!names.has(name)) chosen.delete(name);
  const body = byId("runs-list");
  const rows = new Map([...body.children].map((row) => [row.run, row]));
  summaries.forEach((run, at) => {
    const row = rows.get(run.name) ?? newRow(run.name);
    fill(row, run);
    if (body.children[at] !== row) body.insertBefore(row, body.children[at] ?? null);
    rows.delete(run.name);
  });
  for (const row of rows.values()) row.remove();
  say("runs-status", summaries.length ? "" : "There are no runs here yet. transformerlm-train writes them; web.runs_dir says where.");
}

function newRow(name) {
  const box = make("input", { type: "checkbox" });
  box.addEventListener("change", () => choose(name, box.checked));
  const label = make("label", { className: "name" }, box, make("span", { className: "dot" }), make("span", {}, name));
  const row = make("tr", { run: name }, make("td", {}, label));
  for (let count = 0; count < 7; count++) row.append(make("td"));
  return row;
}

function fill(row, run) {
  const steps = run.max_steps == null ? whole(run.step) : `${whole(run.step)} / ${whole(run.max_steps)}`;
  const values = [STATES[run.state] ?? run.state, steps, fixed(run.loss), fixed(run.val_loss), fixed(run.best_val_loss),
    short(run.tokens_per_second), short(run.parameters)];
  values.forEach((value, at) => {
    const cell = row.children[at + 1];
    if (cell.textContent !== value) cell.textContent = value;
  });
  row.children[1].className = `state-${run.state}`;
  const one = chosen.get(run.name);
  row.querySelector("input").checked = !!one;
  row.querySelector(".dot").style.background = one ? colourOf(one.colour) : "";
}

function add(name) {
  const taken = new Set([...chosen.values()].map((one) => one.colour));
  const colour = [...Array(MOST).keys()].find((number) => !taken.has(number));
  chosen.set(name, { lines: new RunLines(name), colour });
}

function fillAll() {
  const known = new Map(summaries.map((run) => [run.name, run]));
  for (const row of byId("runs-list").children) fill(row, known.get(row.run));
}

async function choose(name, isOn) {
  if (isOn && chosen.size >= MOST) say("runs-status", `At most ${MOST} runs are shown at once.`, true);
  else if (isOn) add(name);
  else chosen.delete(name);
  sessionStorage.setItem(CHOSEN, JSON.stringify([...chosen.keys()]));
  fillAll();
  if (isOn) await refresh([name]);
  else draw();
  await showConfig();
}

// --- what is new ---

async function refresh(names) {
  const found = names.map((name) => chosen.get(name)).filter(Boolean);
  const all = await Promise.allSettled(found.map((one) => one.lines.update()));
  const failed = all.find((one) => one.status === "rejected");
  if (failed) say("runs-status", failed.reason.message, true);
  draw();
}

// Listen while the tab is seen. A browser opens few connections to one server, so a tab in the background has none.
async function watch(signal) {
  while (!signal.aborted) {
    try {
      const response = await ask("/api/events", { signal });
      await list();
      await refresh([...chosen.keys()]);
      for await (const { event, data } of events(response)) {
        if (event !== "grown") continue;
        await Promise.all([list(), refresh(data.runs)]);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      say("runs-status", error.message, true);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

// --- curves ---

function draw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => {
    const axis = form.elements.namedItem("x").value;
    const weight = Number(form.elements.namedItem("smoothing").value);
    const options = { xLabel: X_LABELS[axis], logX: form.elements.namedItem("log_x").checked, logY: form.elements.namedItem("log_y").checked,
      marks: marksOn(axis) };
    for (const [metric, title] of Object.entries(TITLES)) {
      if (!charts.has(metric)) charts.set(metric, new Chart(byId("charts"), title));
      charts.get(metric).draw([...chosen].flatMap(([name, one]) => curvesOf(name, one, metric, axis, weight)), options);
    }
    showSamples();
    showEvents();
  });
}

function curvesOf(name, { lines, colour }, metric, axis, weight) {
  const xs = lines.columns[axis];
  const ys = lines.columns[metric];
  const points = metric === "val_loss";
  if (!weight || metric === "lr" || metric === "val_loss") return [{ name, colour, xs, ys, points }];
  return [{ name: `${name}, raw`, colour, xs, ys, faint: true }, { name, colour, xs, ys: smoothed(ys, weight) }];
}

function marksOn(axis) {
  return [...chosen.values()].flatMap(({ lines, colour }) => lines.events.map((event) => ({ x: lines.xOf(event.step, axis), colour })));
}

function showEvents() {
  const found = [...chosen].flatMap(([name, { lines }]) => lines.events.map((event) => ({ name, ...event })));
  byId("events-card").hidden = !found.length;
  const items = found.slice(-200).map((event) => make("li", {}, `${event.name}: ${event.words}`));
  byId("run-events").replaceChildren(...items);
}

// --- samples ---

function showSamples() {
  const names = [...chosen].filter(([, one]) => one.lines.samples.size).map(([name]) => name);
  byId("samples-card").hidden = !names.length;
  if (!names.length) return;
  setOptions(byId("sample-run"), names);
  const { samples } = chosen.get(byId("sample-run").value).lines;
  setOptions(byId("sample-prompt"), [...samples.keys()], (prompt) => (prompt.length > 60 ? `${prompt.slice(0, 60)}…` : prompt || "(nothing)"));
  const list = samples.get(byId("sample-prompt").value);
  const slider = byId("sample-step");
  const wasLast = slider.value === slider.max; // who looks at the newest sample goes on seeing the newest
  slider.max = String(list.length - 1);
  if (wasLast) slider.value = slider.max;
  const sample = list[Number(slider.value)];
  slider.setAttribute("aria-valuetext", `step ${sample.step}`);
  byId("sample-at").textContent = `step ${whole(sample.step)}`;
  const prompt = byId("sample-prompt").value;
  const rest = sample.text.startsWith(prompt) ? sample.text.slice(prompt.length) : sample.text;
  byId("sample-text").replaceChildren(make("span", { className: "prompt" }, prompt), make("span", {}, rest));
}

// --- configurations ---

async function showConfig() {
  const names = [...chosen.keys()];
  const asked = JSON.stringify(names);
  byId("config-card").hidden = !names.length;
  if (!names.length || asked === configOf) return;
  configOf = asked;
  const head = names.length > 1 ? make("tr", {}, make("td"), ...names.map((name) => make("th", { scope: "col" }, name))) : null;
  const rows = names.length > 1 ? await differences(names) : await configuration(names[0]);
  if (asked !== configOf) return;
  byId("config-title").textContent = names.length === 1 ? `Configuration of ${names[0]}`
    : rows.length ? "Differences of the configurations" : "The configurations are the same";
  byId("config").replaceChildren(...(head && rows.length ? [head] : []), ...rows);
}

const cell = (value) => make("td", {}, value === undefined || value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));
const keyOf = (key) => make("th", { scope: "row" }, key);

async function differences(names) {
  const query = new URLSearchParams(names.map((name) => ["run", name]));
  const found = (await askJson(`/api/differences?${query}`)).differences;
  return Object.entries(found).map(([key, values]) => make("tr", {}, keyOf(key), ...names.map((name) => cell(values[name]))));
}

async function configuration(name) {
  const { config } = await askJson(`/api/run?${new URLSearchParams({ run: name })}`);
  return Object.entries(config).map(([key, value]) => make("tr", {}, keyOf(key), cell(value)));
}

// --- the tab ---

async function begin(signal) {
  try {
    await list();
    const kept = JSON.parse(sessionStorage.getItem(CHOSEN) ?? "null") ?? summaries.slice(0, 1).map((run) => run.name);
    for (const { name } of summaries) if (kept.includes(name) && !chosen.has(name) && chosen.size < MOST) add(name);
    fillAll();
    await showConfig();
  } catch (error) {
    say("runs-status", error.message, true);
  }
  await watch(signal);
}

export function open() {
  if (watching || document.hidden) return;
  watching = new AbortController();
  begin(watching.signal);
}

export function close() {
  watching?.abort();
  watching = null;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) close();
  else if (!byId("runs").hidden) open();
});
form.addEventListener("input", draw);
form.addEventListener("submit", (event) => event.preventDefault());
for (const id of ["sample-run", "sample-prompt", "sample-step"]) byId(id).addEventListener("input", showSamples);
