// The form beside the text: what a request for more text holds.

import { byId, setOptions } from "/static/dom.js";

const KEPT = "transformerlm.settings";
const WHOLE_NUMBERS = ["top_k", "max_tokens", "n", "seed"];
const NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"];
const form = byId("settings");
const field = (name) => form.elements.namedItem(name);
let cards = [];

// Return what the form says: the request's keys, the models that are asked, how many choices, and the seed.
export function read() {
  const wrong = [...form.elements].find((one) => one.willValidate && !one.checkValidity());
  if (wrong) {
    wrong.closest("details")?.setAttribute("open", "");
    wrong.reportValidity();
    return null;
  }
  const keys = {};
  for (const name of NUMBERS) if (field(name).value !== "") keys[name] = Number(field(name).value);
  for (const name of WHOLE_NUMBERS) if (field(name).value !== "") keys[name] = Math.trunc(Number(field(name).value));
  keys.n ??= 1;
  keys.max_tokens ??= 64;
  keys.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; // known, so that two checkpoints get the same
  const beside = field("beside").value;
  return { keys, models: [field("model").value, ...(beside ? [beside] : [])] };
}

// Show which models can be asked for, as /v1/models lists them.
export function setModels(found) {
  cards = found;
  const names = cards.map((card) => card.id);
  setOptions(field("model"), names, labelOf);
  setOptions(field("beside"), ["", ...names], (name) => (name ? labelOf(name) : "nothing"));
}

export const cardOf = (name) => cards.find((card) => card.id === name) ?? cards[0];

export function labelOf(name) {
  const card = cards.find((one) => one.id === name);
  if (!card) return name;
  const step = `step ${card.step.toLocaleString("en")}`;
  return name.includes("@") ? step : `${name} (${step})`;
}

function keep() {
  const values = [...form.elements].filter((one) => one.name && one.tagName === "INPUT").map((one) => [one.name, one.value]);
  sessionStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(values)));
}

for (const [name, value] of Object.entries(JSON.parse(sessionStorage.getItem(KEPT) ?? "{}"))) {
  if (field(name)) field(name).value = value;
}
form.addEventListener("change", keep);
form.addEventListener("submit", (event) => event.preventDefault());
