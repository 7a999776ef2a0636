// The tab Tokens: what the model's tokenizer makes of a text.

import { askJson } from "/static/api.js";
import { byId, make, say, showNumbers, whole } from "/static/dom.js";
import { bytesOfHex, hexOf, readable } from "/static/pieces.js";

const WAIT_MS = 150;
const MOST_SHOWN = 2000;
const field = byId("tokens-text");
let timer = 0;
let asked = 0;

async function look() {
  const number = ++asked;
  try {
    const body = { prompt: field.value, add_special_tokens: false };
    const found = await askJson("/tokenize", { body });
    if (number === asked) show(found);
  } catch (error) {
    if (number === asked) say("tokens-status", error.message, true);
  }
}

function show(found) {
  const all = found.bytes.map(bytesOfHex);
  const size = all.reduce((sum, bytes) => sum + bytes.length, 0);
  showNumbers(byId("tokens-numbers"), [
    ["Tokens", whole(found.count)],
    ["Bytes", whole(size)],
    ["Bytes per token", found.count ? (size / found.count).toFixed(2) : "–"],
    ["Characters", whole([...field.value].length)],
    ["The model's context", whole(found.max_model_len)],
  ]);
  const items = all.slice(0, MOST_SHOWN).map((bytes, at) => make("li", { className: `t${at % 4}` },
    make("span", { className: "piece" }, readable(bytes)), make("small", {}, String(found.tokens[at])), make("small", {}, hexOf(bytes))));
  byId("tokens-list").replaceChildren(...items);
  say("tokens-status", found.count > MOST_SHOWN ? `The first ${whole(MOST_SHOWN)} tokens are shown.` : "");
}

field.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(look, WAIT_MS);
});
export const open = look;
