// The tab Write. A transparent text field lies over the same text in colours, so that typing, selecting and screen
// readers work as in any text field.

import { byId, make, say } from "/static/dom.js";
import { chosen, complete, promptOf, scored, withIds } from "/static/completing.js";
import { before, edited, joined, pieceBefore, show, spellAll, textOf } from "/static/pieces.js";
import * as popover from "/static/popover.js";
import * as settings from "/static/settings.js";

const KEPT = "transformerlm.text";
const HOVER_MS = 120; // so that nothing flickers while the mouse passes over a text
const TYPING_MS = 800; // what is typed within it is undone together
const field = byId("text");
const backdrop = byId("backdrop");
let pieces = [];
let past = [];
let future = [];
let lastTyped = 0;
let running = null;
let near = -1;

// --- the text, and what it was before ---

function render(caret = null) {
  show(backdrop, [...pieces, { text: "\u200b" }]); // without the last one, a last empty line would have no height
  const text = textOf(pieces);
  if (field.value !== text) field.value = text;
  if (caret !== null) field.setSelectionRange(caret, caret);
  byId("undo").disabled = !past.length || !!running;
  byId("redo").disabled = !future.length || !!running;
}

function remember() {
  past.push({ pieces, caret: field.selectionStart });
  if (past.length > 200) past.shift();
  future = [];
}

function travel(from, to) {
  if (!from.length || running) return;
  to.push({ pieces, caret: field.selectionStart });
  const found = from.pop();
  pieces = found.pieces;
  lastTyped = 0;
  changed(found.caret);
}

function changed(caret = null) {
  popover.close();
  byId("score").textContent = "";
  render(caret);
  keep();
}

function keep() {
  const plain = pieces.map((piece) => (piece.bytes ? { ...piece, bytes: [...piece.bytes] } : piece));
  for (const kept of [plain, [{ text: textOf(pieces) }]]) { // where all is too long to be kept, the words alone
    sessionStorage.removeItem(KEPT);
    try {
      return sessionStorage.setItem(KEPT, JSON.stringify(kept));
    } catch {
      continue;
    }
  }
}

function restore() {
  try {
    pieces = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
    for (const piece of pieces) if (piece.bytes) piece.bytes = Uint8Array.from(piece.bytes);
  } catch {
    pieces = [];
  }
  render(textOf(pieces).length);
}

field.addEventListener("input", () => {
  const now = Date.now();
  if (now - lastTyped > TYPING_MS) remember();
  lastTyped = now;
  pieces = edited(pieces, field.value);
  changed();
});

// --- going on ---

// Run one job at a time; `work` gets the signal that Stop gives.
async function job(work) {
  if (running) return;
  running = new AbortController();
  lastTyped = 0;
  field.readOnly = true;
  for (const id of ["continue", "perplexity", "alternatives"]) byId(id).disabled = true;
  byId("stop").disabled = false;
  byId("write-status").setAttribute("aria-busy", "true"); // what is said meanwhile is read out when it is done
  render();
  try {
    await work(running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("write-status", "Stopped.");
    else say("write-status", error.message, true);
  } finally {
    running = null;
    byId("write-status").setAttribute("aria-busy", "false");
    field.readOnly = false;
    for (const id of ["continue", "perplexity", "alternatives"]) byId(id).disabled = false;
    if (document.activeElement === byId("stop")) field.focus();
    byId("stop").disabled = true;
    keep();
    render(null);
  }
}

// Continue after `head`; `tail` stays after what the model writes.
function goOn(head, tail) {
  const asked = settings.read();
  if (!asked || running) return; // what is wrong with a setting is said there, and the focus stays there
  popover.close();
  field.focus();
  byId("branches").replaceChildren();
  job(async (signal) => {
    say("write-status", "Reading…");
    const read = await withIds(head, signal);
    if (asked.models.length * asked.keys.n > 1) return sideBySide(asked, read, tail, signal);
    remember();
    pieces = joined([...read, ...tail]);
    render(textOf(read).length);
    return inline(asked, read, tail, signal);
  });
}

async function bodyFor(model, asked, read) {
  const context = settings.cardOf(model)?.max_model_len ?? Infinity;
  // At least half of the context is for the prompt, so that a long answer does not forget what it answers.
  const max_tokens = Math.min(asked.keys.max_tokens, Math.max(context - Math.min(read.length + 1, context >> 1), 1));
  const { prompt, num_cut } = await promptOf(read, context - max_tokens + 1);
  return { body: { ...asked.keys, model, prompt, max_tokens }, num_cut };
}

async function inline(asked, read, tail, signal) {
  const { body, num_cut } = await bodyFor(asked.models[0], asked, read);
  const began = performance.now();
  const made = [];
  byId("score").textContent = "";
  say("write-status", "Waiting for the first token…");
  const told = await complete(body, {
    signal,
    onTokens: (_, tokens) => {
      made.push(...tokens);
      const whole = spellAll([...read, ...made]);
      pieces = joined([...whole, ...tail]);
      render(textOf(whole).length);
      say("write-status", rate(made.length, began));
    },
  });
  say("write-status", [rate(made.length, began), ...facts(told, num_cut)].join(" · "));
}

async function sideBySide(asked, read, tail, signal) {
  const began = performance.now();
  let count = 0;
  const work = asked.models.map(async (model) => {
    const { body, num_cut } = await bodyFor(model, asked, read);
    const branches = Array.from({ length: body.n }, (_, index) => branch(model, body.seed + index, read, tail));
    const told = await complete(body, {
      signal,
      onTokens: (index, tokens) => {
        count += tokens.length;
        branches[index].add(tokens);
        say("write-status", rate(count, began));
      },
    });
    return facts(told, num_cut);
  });
  const all = await Promise.allSettled(work);
  const failed = all.find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
  say("write-status", `${rate(count, began)} · seed ${asked.keys.seed} · Keep puts one into the text`);
}

// Show one of several continuations; it can be kept.
function branch(model, seed, read, tail) {
  const made = [];
  const text = make("div", { className: "ink" });
  const take = make("button", { type: "button", "aria-label": `Keep the text of ${settings.labelOf(model)}, seed ${seed}` }, "Keep");
  const head = make("header", {}, make("span", {}, settings.labelOf(model)), make("span", {}, `seed ${seed}`), take);
  byId("branches").append(make("article", { className: "card", "aria-label": `${settings.labelOf(model)}, seed ${seed}` }, head, text));
  take.addEventListener("click", () => {
    if (running) return;
    remember();
    pieces = joined([...spellAll([...read, ...made]), ...tail]);
    changed(textOf(read).length + textOf(made).length);
    field.focus();
  });
  watch(text, () => made, (number, one) => goOnFrom([...read, ...made.slice(0, number)], one, made[number]));
  return {
    add: (tokens) => {
      made.push(...tokens);
      spellAll([...read, ...made]);
      show(text, made);
    },
  };
}

// Continue after `head` and an alternative to the token that follows it.
function goOnFrom(head, one, token) {
  goOn(spellAll([...head.map((piece) => ({ ...piece })), chosen(one, token)]), []);
}

function rate(count, began) {
  const seconds = (performance.now() - began) / 1000;
  return `${count} tokens in ${seconds.toFixed(1)} s, ${(count / seconds).toFixed(0)} a second`;
}

function facts(told, num_cut) {
  const ends = { length: "max tokens reached", stop: "the model ended the text" };
  const found = [`seed ${told.seed}`];
  if (told.step !== undefined) found.push(`step ${told.step.toLocaleString("en")}`);
  if (told.finish[0]) found.push(ends[told.finish[0]] ?? told.finish[0]);
  if (num_cut) found.push(`the first ${num_cut} tokens are beyond the model's context`);
  return found;
}

function continueAtCursor() {
  const place = field.selectionEnd;
  const tail = textOf(pieces).slice(place);
  goOn(before(pieces, place), tail ? [{ text: tail }] : []);
}

function measure() {
  const asked = settings.read();
  if (!asked || running || !textOf(pieces)) return;
  job(async (signal) => {
    say("write-status", "Reading…");
    const model = asked.models[0];
    const found = await scored(await withIds(pieces, signal), model, settings.cardOf(model).max_model_len, signal);
    pieces = found.pieces;
    const known = pieces.filter((piece) => piece.logprob != null);
    const nats = -known.reduce((sum, piece) => sum + piece.logprob, 0);
    const bytes = known.reduce((sum, piece) => sum + piece.bytes.length, 0);
    const mean = nats / known.length;
    byId("score").textContent = known.length
      ? `perplexity ${Math.exp(mean).toFixed(2)} · ${mean.toFixed(3)} nats a token · ${(nats / Math.LN2 / bytes).toFixed(3)} bits a byte`
      : "a single token has no perplexity";
    const cut = found.num_cut ? `; the first ${found.num_cut} are beyond the model's context` : "";
    say("write-status", `${known.length} tokens by ${settings.labelOf(model)}${cut}`);
  });
}

// --- alternatives ---

// Show the alternatives to the token under the mouse; `over` is what gets its events.
function watch(place, tokens, choose, over = place) {
  let timer = 0;
  const soon = (event) => {
    clearTimeout(timer);
    timer = setTimeout(look, HOVER_MS, event);
  };
  const leave = () => {
    clearTimeout(timer);
    popover.closeSoon();
  };
  const look = (event) => {
    clearTimeout(timer);
    if (running) return;
    const span = document.elementsFromPoint(event.clientX, event.clientY).find((one) => one.parentElement === place);
    const number = span ? [...place.children].indexOf(span) : -1;
    const piece = tokens()[number];
    if (!piece?.top?.length) return popover.closeSoon();
    popover.open(span, piece, (one) => choose(number, one));
  };
  over.addEventListener("mousemove", soon);
  over.addEventListener("click", look);
  over.addEventListener("mouseleave", leave);
}

watch(backdrop, () => pieces, (number, one) => goOnFrom(pieces.slice(0, number), one, pieces[number]), field);

function alternativesAtCursor() {
  const number = pieceBefore(pieces, field.selectionEnd);
  const piece = pieces[number];
  if (running) return;
  if (!piece?.top?.length) {
    say("write-status", "No alternatives are known of the token before the cursor; Perplexity asks the model for them.");
    return;
  }
  popover.open(backdrop.children[number], piece, (one) => goOnFrom(pieces.slice(0, number), one, piece), field);
}

function markNear() {
  backdrop.children[near]?.classList.remove("near");
  near = document.activeElement === field ? pieceBefore(pieces, field.selectionEnd) : -1;
  if (pieces[near]?.top?.length && !running) {
    backdrop.children[near].classList.add("near");
    byId("alternatives").title = `${(100 * Math.exp(pieces[near].logprob)).toFixed(1)} %`;
  }
}

// --- keys and buttons ---

document.addEventListener("selectionchange", markNear);
field.addEventListener("blur", markNear);
byId("continue").addEventListener("click", continueAtCursor);
byId("stop").addEventListener("click", () => running?.abort());
byId("undo").addEventListener("click", () => travel(past, future));
byId("redo").addEventListener("click", () => travel(future, past));
byId("perplexity").addEventListener("click", measure);
byId("alternatives").addEventListener("click", alternativesAtCursor);
byId("write").addEventListener("keydown", (event) => {
  const ctrl = event.ctrlKey || event.metaKey;
  if (ctrl && event.key === "Enter") continueAtCursor();
  else if (event.key === "Escape" && running) running.abort();
  else if (event.altKey && event.key === "ArrowDown" && event.target === field) alternativesAtCursor();
  else if (ctrl && event.target === field && event.key.toLowerCase() === "z") {
    if (event.shiftKey) travel(future, past);
    else travel(past, future);
  } else if (ctrl && event.target === field && event.key === "y") travel(future, past);
  else return;
  event.preventDefault();
});

restore();
export const focus = () => field.focus({ preventScroll: true });
