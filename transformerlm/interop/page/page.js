// The page: what a person types and sees. The model is in a worker (engine.js), so that the page never waits for it.

const byId = (id) => document.getElementById(id);
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const MOST_RANDOM = 2 ** 32;
const REASONS = { limit: "", end: "; the text ended", stopped: "; stopped" };
const NEAR_PX = 80; // from the bottom: someone there follows the text

let data, worker, form, field;
let history = []; // the texts before each writing since the last edit, for Undo
let isLoaded = false;
let isWriting = false;
let waiting = ""; // text that is not shown yet
let told = {}; // what the worker said of the text so far

function say(words, isBad = false) {
  byId("status").textContent = words;
  byId("status").classList.toggle("bad", isBad);
}

// --- loading ---

function start() {
  form = byId("form");
  field = byId("text");
  if (!byId("last")) return say("This file is not complete: ask for it again, or copy it again.", true);
  data = JSON.parse(byId("data").textContent);
  show();
  try {
    worker = new Worker(URL.createObjectURL(new Blob([byId("engine").textContent], { type: "text/javascript" })));
  } catch (error) {
    return say(`This browser starts no worker for a page that is a file; open it in another one. (${error.message})`, true);
  }
  worker.onmessage = ({ data: message }) => HEARD[message.is](message);
  worker.onerror = (event) => fail(event.message || "The worker did not start.");
  worker.postMessage({ do: "load", header: data.header });
  send([...document.querySelectorAll("script.weights")]);
}

// Give the worker one block after the other, with pauses in which the page can be used.
function send(blocks) {
  const block = blocks.shift();
  if (!block) return worker.postMessage({ do: "build" });
  worker.postMessage({ do: "chunk", text: block.textContent });
  block.remove(); // its memory is not needed any more
  setTimeout(() => send(blocks));
}

function show() {
  byId("size").textContent = `${SHORT.format(data.num_parameters)} parameters`;
  byId("made").textContent = data.made;
  field.placeholder = data.prompt;
  if (data.language) field.lang = data.language;
  field.dir = "auto";
  for (const [name, value] of Object.entries(data.sampling)) form.elements[name].value = value ?? "";
  for (const [words, value] of Object.entries(data.facts)) {
    const row = byId("facts").insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = words;
    row.append(head);
    row.insertCell().textContent = value;
  }
}

// --- writing ---

function write() {
  const fields = form.elements;
  const seed = fields.seed.value === "" ? Math.floor(Math.random() * MOST_RANDOM) : Number(fields.seed.value);
  const sampling = { top_k: Number(fields.top_k.value) };
  for (const name of ["temperature", "top_p", "min_p"]) sampling[name] = Number(fields[name].value);
  history.push(field.value);
  told = { seed, slid: "" };
  setWriting(true);
  say("Reading …");
  worker.postMessage({ do: "write", prompt: field.value, max_new_tokens: Number(fields.max_new_tokens.value), sampling, seed });
}

function again() {
  if (form.elements.seed.value !== "") form.elements.seed.value = Number(form.elements.seed.value) + 1;
  undo();
  byId("write").click();
}

function undo() {
  setText(history.pop());
  setWriting(false);
}

function stop() {
  if (isWriting) worker.postMessage({ do: "stop" });
}

function setWriting(on) {
  isWriting = on;
  field.readOnly = on;
  byId("write").disabled = on || !isLoaded;
  byId("write").hidden = on;
  byId("stop").hidden = !on;
  for (const id of ["again", "undo"]) byId(id).disabled = on || history.length === 0;
}

function setText(text) {
  field.value = text;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// A text that a person has changed is theirs: Undo and Again no longer touch it.
function edited() {
  history = [];
  setWriting(isWriting);
  setText(field.value);
}

// Show the text that has come, and follow its end if the reader is there.
function flush() {
  if (!waiting) return;
  const page = document.documentElement;
  const follows = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_PX;
  setText(field.value + waiting);
  waiting = "";
  field.setSelectionRange(field.value.length, field.value.length);
  if (follows) page.scrollTop = page.scrollHeight;
}

const counted = (count) => `${WHOLE.format(count)} token${count === 1 ? "" : "s"}`;

function progress() {
  if (!isWriting) return;
  flush();
  if (told.count) say(`${counted(told.count)} · context ${WHOLE.format(told.context)} of ${WHOLE.format(data.context_length)}${told.slid}`);
}

function fail(message) {
  if (isWriting) history.pop();
  setWriting(false);
  say(message, true);
}

const HEARD = {
  loaded() {
    isLoaded = true;
    setWriting(false);
    say("Ready.");
  },
  reading({ done, of }) {
    say(`Reading the text: ${WHOLE.format((100 * done) / of)} %`);
  },
  text({ text, count, context }) {
    if (!waiting) requestAnimationFrame(progress);
    waiting += text;
    Object.assign(told, { count, context });
  },
  slid({ kept }) {
    told.slid = `; from here on it reads the last ${counted(kept)}`;
  },
  end({ reason, text, count, seconds, prompt, read }) {
    waiting += text;
    flush();
    setWriting(false);
    const speed = count > 1 ? `, ${WHOLE.format((count - 1) / seconds)} tokens/s` : "";
    const cut = read < prompt ? `; it read the last ${WHOLE.format(read)} of ${counted(prompt)}` : "";
    say(`${counted(count)}${speed}, seed ${told.seed}${REASONS[reason]}${cut}${told.slid}.`);
  },
  error({ message }) {
    fail(message);
  },
};

document.addEventListener("DOMContentLoaded", () => {
  start();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!isWriting && !byId("write").disabled) write();
  });
  byId("stop").addEventListener("click", stop);
  byId("again").addEventListener("click", again);
  byId("undo").addEventListener("click", undo);
  field.addEventListener("input", edited);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    byId("write").click();
  });
});
