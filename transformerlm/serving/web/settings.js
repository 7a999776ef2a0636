// The forms beside a text and a conversation: what a request for more text holds.

import { byId, setOptions } from "/static/dom.js";

const KEPT = "transformerlm.settings";
const WHOLE_NUMBERS = ["top_k", "max_tokens", "n", "seed"];
const NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"];
const form = byId("settings");
const field = (name) => form.elements.namedItem(name);
let cards = [];

// A field's step is what the arrows do: a number between two steps is wrong only where it must be whole.
function isWrong({ name, validity }) {
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = validity;
  return badInput || rangeUnderflow || rangeOverflow || (stepMismatch && WHOLE_NUMBERS.includes(name));
}

// Return a form's numbers as the keys of a request, with a seed in any case; null where one of them is wrong.
export function keysOf(form) {
  const wrong = [...form.elements].find(isWrong);
  if (wrong) {
    wrong.closest("details")?.setAttribute("open", "");
    wrong.reportValidity();
    return null;
  }
  const valueOf = (name) => form.elements.namedItem(name)?.value ?? "";
  const keys = {};
  for (const name of NUMBERS) if (valueOf(name) !== "") keys[name] = Number(valueOf(name));
  for (const name of WHOLE_NUMBERS) if (valueOf(name) !== "") keys[name] = Math.trunc(Number(valueOf(name)));
  keys.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; // known, so that two checkpoints get the same
  return keys;
}

// Return what the form says: the request's keys, the models that are asked, how many choices, and the seed.
export function read() {
  const keys = keysOf(form);
  if (!keys) return null;
  keys.n ??= 1;
  keys.max_tokens ??= 64;
  const beside = field("beside").value;
  return { keys, models: [field("model").value, ...(beside ? [beside] : [])] };
}

// Show which models can be asked for, as /v1/models lists them.
export function setModels(found) {
  cards = found;
  const names = cards.map((card) => card.id);
  for (const one of [form, byId("chat-settings")]) setOptions(one.elements.namedItem("model"), names, labelOf);
  setOptions(field("beside"), ["", ...names], (name) => (name ? labelOf(name) : "nothing"));
}

export const cardOf = (name) => cards.find((card) => card.id === name) ?? cards[0];

export function labelOf(name) {
  const card = cards.find((one) => one.id === name);
  if (!card) return name;
  const step = `step ${card.step.toLocaleString("en")}`;
  return name.includes("@") ? step : `${name} (${step})`;
}

// Keep what a form says until the page's tab is closed, and show what was kept; nothing is sent by it.
export function keepForm(form, name) {
  const fields = () => [...form.elements].filter((one) => one.name && one.tagName !== "SELECT");
  const kept = JSON.parse(sessionStorage.getItem(name) ?? "{}");
  for (const one of fields()) if (Object.hasOwn(kept, one.name)) one.value = kept[one.name];
  form.addEventListener("change", () => {
    sessionStorage.setItem(name, JSON.stringify(Object.fromEntries(fields().map((one) => [one.name, one.value]))));
  });
  form.addEventListener("submit", (event) => event.preventDefault());
}

keepForm(form, KEPT);
