// Runs as people look at them: a list to choose from, their curves, what they wrote, how they were configured, where they ran.
// Where they come from is a source's affair:
//   fill(lines)      gives a run's lines (run_lines.js) what is new, and says whether there was anything
//   config(name)     resolves to {config, defaults}: dotted keys with values

import { Chart, colourOf, dark, isDashed } from "/static/chart.js";
import { byId, fixed, make, replace, say, setOptions, short, whole } from "/static/dom.js";
import { RunLines, smoothed } from "/static/run_lines.js";

const MOST = 12;
const PATIENCE_MS = 500; // while more runs are on their way, those that are there are drawn this often
const CHARTS = { loss: { title: "Loss" }, val_loss: { title: "Validation loss", isExact: true }, bits_per_byte: { title: "Validation, bits per byte", isExact: true },
  lr: { title: "Learning rate", isExact: true }, grad_norm: { title: "Gradient norm" }, tokens_per_second: { title: "Tokens a second" },
  memory: { title: "Peak memory, GB", isExact: true, factor: 1e-9, leastTop: 1e-3 } };
const TIMES = [[2 * 3600, 3600, "hours of training"], [300, 60, "minutes of training"], [0, 1, "seconds of training"]];
const X_LABELS = { step: "step", tokens: "tokens", flops: "FLOPs" };
const SMALL = new Set(["checkpoint_saved"]);
const MOST_SMALL = 200; // of one run in the list of events
const LISTED_ALONE = new Set(["started", "finished"]); // listed, and not drawn: a curve shows where it begins and ends
const SHOWN = { differences: "what differs between the runs", changed: "what differs from the defaults", all: "everything" };
const form = byId("curves");
const field = (name) => form.elements.namedItem(name);
const chosen = new Map(); // name -> {lines, colour, starts}, the starts that its lines had when they were read last
const charts = new Map();
const configs = new Map(); // name -> {config, defaults}
const asked = new Map(); // name -> the promise of its configuration, so that nobody asks a second time
let source = null;
let remember = () => {};
let summaries = [];
let drawing = 0;
let loading = 0; // how many answers are on their way
let drawnAt = 0;
let isStale = false; // something has come that is not drawn
let zoom = null; // [from, to] in steps, tokens, seconds or FLOPs; either may be null
let shownUnit = 1;

// Show the runs of a source; `remembered` is told which ones are chosen.
export function showRuns(from, remembered = () => {}) {
  source = from;
  remember = remembered;
}

export const chosenNames = () => [...chosen.keys()];

// --- the list ---

export function showList(found) {
  summaries = found;
  const names = new Set(summaries.map((run) => run.name));
  const gone = chosenNames().filter((name) => !names.has(name));
  for (const name of gone) chosen.delete(name);
  const body = byId("runs-list");
  const rows = new Map([...body.children].map((row) => [row.run, row]));
  summaries.forEach((run, at) => {
    const row = rows.get(run.name) ?? newRow(run.name);
    fillRow(row, run);
    if (body.children[at] !== row) body.insertBefore(row, body.children[at] ?? null);
    rows.delete(run.name);
  });
  for (const row of rows.values()) row.remove();
  if (!gone.length) return;
  draw();
  showConfig();
}

function newRow(name) {
  const box = make("input", { type: "checkbox" });
  box.addEventListener("change", () => choose(name, box.checked));
  const label = make("label", { className: "name" }, box, make("span", { className: "dot" }), make("span", {}, name));
  const row = make("tr", { run: name }, make("td", {}, label));
  for (let count = 0; count < 7; count++) row.append(make("td"));
  return row;
}

function fillRow(row, run) {
  const steps = run.max_steps == null ? whole(run.step) : `${whole(run.step)} / ${whole(run.max_steps)}`;
  const values = [run.state, steps, fixed(run.loss), fixed(run.val_loss), fixed(run.best_val_loss), short(run.tokens_per_second), short(run.parameters)];
  values.forEach((value, at) => {
    const cell = row.children[at + 1];
    if (cell.textContent !== value) cell.textContent = value;
  });
  row.children[1].className = `state-${run.state}`;
  const one = chosen.get(run.name);
  row.querySelector("input").checked = !!one;
  const dot = row.querySelector(".dot");
  dot.style.color = one ? colourOf(one.colour) : "";
  dot.classList.toggle("chosen", !!one);
  dot.classList.toggle("dashed", !!one && isDashed(one.colour));
}

function add(name) {
  const taken = new Set([...chosen.values()].map((one) => one.colour));
  const colour = [...Array(MOST).keys()].find((number) => !taken.has(number));
  chosen.set(name, { lines: new RunLines(name, source), colour, starts: null });
  configs.delete(name);
  isStale = true;
}

function fillAll() {
  const known = new Map(summaries.map((run) => [run.name, run]));
  for (const row of byId("runs-list").children) fillRow(row, known.get(row.run));
}

// Choose those of the runs that are listed, as many as can be shown.
export async function chooseAll(names) {
  for (const { name } of summaries) if (names.includes(name) && !chosen.has(name) && chosen.size < MOST) add(name);
  fillAll();
  await showConfig();
}

async function choose(name, isOn) {
  if (isOn && chosen.size >= MOST) say("runs-status", `At most ${MOST} runs are shown at once.`, true);
  else if (isOn) add(name);
  else chosen.delete(name);
  remember(chosenNames());
  fillAll();
  if (isOn) await refresh([name]);
  else draw();
  await showConfig();
}

// Take what is new of these runs, and draw.
export async function refresh(names) {
  const found = names.map((name) => chosen.get(name)).filter(Boolean);
  loading += 1;
  const all = await Promise.allSettled(found.map((one) => one.lines.update()));
  loading -= 1;
  const failed = all.find((one) => one.status === "rejected");
  if (failed) say("runs-status", failed.reason.message, true);
  isStale ||= all.some((one) => one.status === "rejected" || one.value);
  if (isStale && (loading === 0 || performance.now() - drawnAt > PATIENCE_MS)) draw();
  for (const one of found) {
    if (one.starts !== null && one.starts !== one.lines.starts) configs.delete(one.lines.name);
    one.starts = one.lines.starts;
  }
  if (found.some((one) => !configs.has(one.lines.name))) await showConfig();
}

// --- curves ---

function draw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(drawNow);
}

function drawNow() {
  drawnAt = performance.now();
  isStale = false;
  const axis = field("x").value;
  const weight = Number(field("smoothing").value);
  const [unit, xLabel] = unitOf(axis);
  if (unit !== shownUnit) showZoom(unit);
  const options = { xLabel, logX: field("log_x").checked, logY: field("log_y").checked, marks: marksOn(axis, unit), xRange: rangeOf(axis, unit) };
  for (const [metric, { title, leastTop = null }] of Object.entries(CHARTS)) {
    if (!charts.has(metric)) charts.set(metric, new Chart(byId("charts"), title, { onZoom: zoomTo }));
    const curves = [...chosen].flatMap(([name, one]) => curvesOf(name, one, metric, { axis, unit, weight }));
    charts.get(metric).draw(curves.sort((one, other) => !!other.faint - !!one.faint), { ...options, leastTop }); // what is faint is behind
  }
  showSamples();
  showEvents();
  showEnvironment();
}

// Return what one unit of an axis is, and its name: seconds are drawn as hours where there are many.
function unitOf(axis) {
  if (axis !== "seconds") return [1, X_LABELS[axis]];
  const longest = Math.max(0, ...[...chosen.values()].map(({ lines }) => lines.clock.seconds.at(-1) ?? 0));
  const [, unit, words] = TIMES.find(([from]) => longest >= from);
  return [unit, words];
}

function curvesOf(name, { lines, colour }, metric, { axis, unit, weight }) {
  const { isExact, factor = 1 } = CHARTS[metric];
  const curve = lines.curves[metric];
  const place = (steps) => lines.places(steps, axis).map((x) => (x === null ? null : x / unit));
  const ys = factor === 1 ? curve.values : curve.values.map((y) => (y === null ? null : y * factor));
  const raw = { name, colour, xs: place(curve.steps), ys, points: metric === "val_loss" || metric === "bits_per_byte" };
  if (metric === "loss" && chosen.size === 1) return [...smooth(raw, curve, weight, place), validation(name, lines, colour, place)];
  return isExact ? [raw] : smooth(raw, curve, weight, place);
}

// Of a thinned curve, the means are smoothed: those of its highest and lowest values would be off.
function smooth(raw, curve, weight, place) {
  if (!weight) return [raw];
  const { steps, values } = curve.means ?? curve;
  return [{ ...raw, name: `${raw.name}, raw`, faint: true }, { ...raw, xs: place(steps), ys: smoothed(values, weight) }];
}

// A run that is shown alone has both losses in one chart.
function validation(name, lines, colour, place) {
  const { steps, values } = lines.curves.val_loss;
  return { name: `${name}, validation`, colour: colour + 1, xs: place(steps), ys: values, points: true };
}

function marksOn(axis, unit) {
  return [...chosen.values()].flatMap(({ lines, colour }) => {
    const events = lines.events.filter(({ kind }) => !LISTED_ALONE.has(kind)).sort((one, other) => one.step - other.step);
    const places = lines.places(events.map(({ step }) => step), axis);
    const marks = events.map(({ kind }, at) => ({ x: places[at], colour, isSmall: SMALL.has(kind) }));
    return marks.filter(({ x }) => x !== null).map((mark) => ({ ...mark, x: mark.x / unit }));
  });
}

// --- a part of the axis ---

function rangeOf(axis, unit) {
  if (!zoom) return null;
  const placesOf = (stepOf) => [...chosen.values()].map(({ lines }) => lines.places([stepOf(lines)], axis)[0]).filter((x) => x > 0);
  const least = field("log_x").checked ? Math.min(...placesOf(({ clock }) => clock.steps[1] ?? 0)) : 0; // a logarithm has no 0
  const [from, to] = [Math.max(zoom[0] ?? 0, least), zoom[1] ?? Math.max(...placesOf(({ now }) => now.step))];
  return from < to && Number.isFinite(to - from) ? [from / unit, to / unit] : null;
}

// A range is in units of the axis; null shows all of it.
function zoomTo(range) {
  const [unit] = unitOf(field("x").value);
  zoom = range && range.map((end) => end * unit);
  showZoom(unit);
  draw();
}

function showZoom(unit) {
  shownUnit = unit;
  const words = (end) => (end == null ? "" : String(Number((end / unit).toPrecision(4))));
  for (const [at, name] of ["from", "to"].entries()) field(name).value = words(zoom?.[at]);
}

function zoomByFields() {
  const [from, to] = ["from", "to"].map((name) => (field(name).value === "" ? null : Number(field(name).value) * shownUnit));
  zoom = from === null && to === null ? null : [from, to];
}

// --- events and environment ---

function showEvents() {
  const found = [...chosen].flatMap(([name, { lines }]) => listed(lines.events).map((words) => (chosen.size > 1 ? `${name}: ${words}` : words)));
  byId("events-card").hidden = !found.length;
  replace(byId("run-events"), ...found.map((words) => make("li", {}, words)));
}

// Return the words of a run's events. A long run has very many of the small ones: of those, the last.
function listed(events) {
  const numLeftOut = events.filter(({ kind }) => SMALL.has(kind)).length - MOST_SMALL;
  if (numLeftOut <= 0) return events.map(({ words }) => words);
  let seen = 0;
  const kept = events.filter(({ kind }) => !SMALL.has(kind) || ++seen > numLeftOut);
  return [`${whole(numLeftOut)} earlier checkpoints are not listed`, ...kept.map(({ words }) => words)];
}

function showEnvironment() {
  const known = new Map([...chosen].map(([name, { lines }]) => [name, lines.environment]).filter(([, facts]) => facts.event));
  byId("environment-card").hidden = !known.size;
  const keys = [...new Set([...known.values()].flatMap((facts) => Object.keys(facts)))].filter((key) => !["event", "step"].includes(key));
  fillTable(byId("environment"), [...known.keys()], keys.map((key) => [key, ...[...known.values()].map((facts) => typed(facts[key]))]));
}

// Return words of a command line as a shell takes them; any other value as it is.
function typed(value) {
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`);
  return Array.isArray(value) ? value.map(String).map(quoted).join(" ") : value;
}

// --- samples ---

function showSamples() {
  const names = [...chosen].filter(([, one]) => one.lines.samples.size).map(([name]) => name);
  byId("samples-card").hidden = !names.length;
  if (!names.length) return;
  setOptions(byId("sample-run"), names);
  const { samples } = chosen.get(byId("sample-run").value).lines;
  setOptions(byId("sample-prompt"), [...samples.keys()], (prompt) => (prompt.length > 60 ? `${prompt.slice(0, 60)}…` : prompt || "(nothing)"));
  const prompt = [...samples.keys()][byId("sample-prompt").selectedIndex]; // an <option> gives back other line ends
  const list = samples.get(prompt);
  const slider = byId("sample-step");
  const wasLast = slider.value === slider.max; // who looks at the newest sample goes on seeing the newest
  slider.max = String(list.length - 1);
  if (wasLast) slider.value = slider.max;
  const sample = list[Number(slider.value)];
  slider.setAttribute("aria-valuetext", `step ${sample.step}`);
  say("sample-at", `step ${whole(sample.step)}`);
  const rest = sample.text.startsWith(prompt) ? sample.text.slice(prompt.length) : sample.text;
  replace(byId("sample-text"), make("span", { className: "prompt" }, prompt), make("span", {}, rest));
}

// --- configurations ---

async function configure(name) {
  if (configs.has(name)) return;
  if (!asked.has(name)) asked.set(name, source.config(name).finally(() => asked.delete(name)));
  configs.set(name, await asked.get(name));
}

async function showConfig() {
  const names = chosenNames();
  byId("config-card").hidden = !names.length;
  if (!names.length) return;
  try {
    await Promise.all(names.map(configure));
  } catch (error) {
    say("runs-status", error.message, true);
    return;
  }
  if (names.join("\n") !== chosenNames().join("\n")) return; // others were chosen meanwhile
  const kinds = names.length > 1 ? ["differences", "changed", "all"] : ["changed", "all"];
  const wereSeveral = byId("config-shown").options.length === 3;
  setOptions(byId("config-shown"), kinds, (kind) => SHOWN[kind]);
  if (names.length > 1 && !wereSeveral) byId("config-shown").value = "differences";
  showKeys(names, byId("config-shown").value);
}

function showKeys(names, kind) {
  const all = names.map((name) => configs.get(name));
  const keys = [...new Set(all.flatMap(({ config }) => Object.keys(config)))];
  const { defaults } = all[0];
  const isShown = (key) => {
    const values = all.map(({ config }) => JSON.stringify(config[key]));
    if (kind === "differences") return new Set(values).size > 1;
    return kind === "all" || values.some((value) => value !== JSON.stringify(defaults[key]));
  };
  const head = kind === "changed" ? [...names, "default"] : names;
  const row = (key) => [key, ...all.map(({ config }) => config[key]), ...(kind === "changed" ? [defaults[key]] : [])];
  const rows = keys.filter(isShown).map(row);
  byId("config-title").textContent = names.length === 1 ? `Configuration of ${names[0]}` : kind !== "differences" ? "Configurations"
    : rows.length ? "Differences of the configurations" : "The configurations are the same";
  fillTable(byId("config"), head, rows);
}

const inWords = (value) => (value === undefined || value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));

// Fill a table with rows [key, value of each run...]. Of several runs, names are above, and what all have is said once.
export function fillTable(table, names, rows) {
  const head = names.length > 1 ? [make("tr", {}, make("td"), ...names.map((name) => make("th", { scope: "col" }, name)))] : [];
  const body = rows.map(([key, ...values]) => {
    const words = values.map(inWords);
    const isShared = words.length > 1 && new Set(words).size === 1;
    const cells = isShared ? [make("td", { colSpan: words.length }, words[0])] : words.map((one) => make("td", {}, one));
    return make("tr", {}, make("th", { scope: "row" }, key), ...cells);
  });
  replace(table, ...head, ...body);
}

form.addEventListener("input", (event) => {
  if (event.target.name === "x") zoomTo(null);
  else if (event.target.className === "place") zoomByFields();
  draw();
});
form.addEventListener("submit", (event) => event.preventDefault());
byId("whole").addEventListener("click", () => zoomTo(null));
for (const id of ["sample-run", "sample-prompt", "sample-step"]) byId(id).addEventListener("input", showSamples);
byId("config-shown").addEventListener("input", showConfig);
dark.addEventListener("change", fillAll);
