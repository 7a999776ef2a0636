// The tab Chat: messages and the model's answers. They stay until the page's tab is closed.

import { ask, askJson, events } from "/static/api.js";
import { byId, make, say } from "/static/dom.js";
import * as settings from "/static/settings.js";

const KEPT = "transformerlm.chat";
const NAMES = { user: "You", assistant: "The model" };
const NEAR_PX = 40; // from the end of the conversation: who reads further up is left there
const form = byId("chat-settings");
const field = byId("chat-text");
const log = byId("chat-log");
let turns = [];
let running = null;
let num_again = 0;
let last_left_out = 0; // of this conversation, how many of the oldest messages were not sent the last time

// Return whether the model was trained on conversations.
export const isOffered = async () => (await askJson("/tokenizer_info")).has_chat_format;

// --- the conversation ---

function show() {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  turns.forEach((turn, at) => {
    const item = log.children[at] ?? log.appendChild(make("article", {}, make("h2"), make("div", { className: "said" })));
    const text = item.lastChild;
    if (item.className !== `turn ${turn.role}`) {
      item.className = `turn ${turn.role}`;
      item.firstChild.textContent = NAMES[turn.role];
    }
    if (text.textContent !== turn.content) text.textContent = turn.content;
  });
  while (log.children.length > turns.length) log.lastChild.remove();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
  byId("chat-send").disabled = !!running;
  byId("chat-stop").disabled = !running;
  byId("chat-again").disabled = !!running || turns.at(-1)?.role !== "assistant";
  byId("chat-new").disabled = !!running || !turns.length;
  log.setAttribute("aria-busy", String(!!running)); // an answer is read out when it is whole
}

function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(turns));
  } catch {
    sessionStorage.removeItem(KEPT); // too long to be kept
  }
}

function restore() {
  try {
    turns = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  } catch {
    turns = [];
  }
}

// --- answers ---

// Ask for an answer; where the conversation is too long for the model, ask without its oldest pairs. Returns the
// response, and how many messages were left out.
async function askFor(keys, system, asked, signal) {
  const model = form.elements.namedItem("model").value;
  const context = settings.cardOf(model)?.max_model_len ?? Infinity;
  const max_tokens = Math.max(1, Math.min(keys.max_tokens ?? 256, Math.floor(context / 2)));
  for (let num_left_out = Math.min(last_left_out, asked.length - 1 - ((asked.length - 1) % 2)); ; num_left_out += 2) {
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...asked.slice(num_left_out)];
    const body = { ...keys, model, messages, max_completion_tokens: max_tokens, stream: true };
    delete body.max_tokens;
    try {
      const response = await ask("/v1/chat/completions", { body, signal });
      last_left_out = num_left_out;
      return { response, num_left_out };
    } catch (error) {
      if (error.code !== "context_length_exceeded" || asked.length - num_left_out < 3) throw error;
    }
  }
}

// Answer the last message, which is the user's, and show the answer as it comes; if nothing comes, call `instead`.
async function answer(keys, instead) {
  const asked = [...turns];
  const reply = { role: "assistant", content: "" };
  const began = performance.now();
  const told = { seed: keys.seed };
  running = new AbortController();
  turns.push(reply);
  say("chat-status", "Waiting for the first token…");
  show();
  try {
    const { response, num_left_out } = await askFor(keys, form.elements.namedItem("system").value, asked, running.signal);
    for await (const { data } of events(response)) {
      if (data.error) throw new Error(data.error.message);
      const [choice] = data.choices;
      told.step = choice.step ?? told.step;
      told.left_out = data.messages_left_out ?? told.left_out; // by the server, where long texts slide
      told.finish = choice.finish_reason ?? told.finish;
      reply.content += choice.delta.content ?? "";
      show();
    }
    say("chat-status", facts(told, began, num_left_out + (told.left_out ?? 0)));
  } catch (error) {
    if (error.name === "AbortError") say("chat-status", "Stopped.");
    else say("chat-status", error.message, true);
    if (!reply.content) instead();
  } finally {
    running = null;
    if (document.activeElement === byId("chat-stop")) field.focus();
    show();
    keep();
  }
}

function facts(told, began, num_left_out) {
  const ends = { length: "max tokens reached" };
  const found = [`${((performance.now() - began) / 1000).toFixed(1)} s`, `seed ${told.seed}`];
  if (told.step !== undefined) found.push(`step ${told.step.toLocaleString("en")}`);
  if (ends[told.finish]) found.push(ends[told.finish]);
  if (num_left_out) found.push(`the oldest ${num_left_out} messages are beyond the model's context`);
  return found.join(" · ");
}

function send() {
  if (running || !field.value.trim()) return;
  const keys = settings.keysOf(form);
  if (!keys) return;
  const [before, said] = [turns, field.value];
  turns = [...before, { role: "user", content: said }];
  field.value = "";
  num_again = 0;
  answer(keys, () => {
    turns = before;
    field.value ||= said; // to be sent again
  });
}

// Answer the last message anew; with a seed that was chosen, each time with the next one.
function regenerate() {
  const keys = settings.keysOf(form);
  if (!keys || running || turns.at(-1)?.role !== "assistant") return;
  const before = turns;
  turns = before.slice(0, -1);
  num_again += 1;
  answer({ ...keys, seed: keys.seed + num_again }, () => (turns = before));
  field.focus();
}

function begin() {
  if (running) return;
  turns = [];
  last_left_out = 0;
  say("chat-status", "");
  show();
  keep();
  field.focus();
}

// --- keys and buttons ---

byId("chat-send").addEventListener("click", () => {
  send();
  field.focus();
});
byId("chat-stop").addEventListener("click", () => running?.abort());
byId("chat-again").addEventListener("click", regenerate);
byId("chat-new").addEventListener("click", begin);
byId("chat").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
  else if (event.key === "Enter" && event.target === field && !event.shiftKey && !event.isComposing) send();
  else return;
  event.preventDefault();
});

settings.keepForm(form, "transformerlm.chat-settings");
restore();
show();
