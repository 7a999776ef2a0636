// The worker: it decodes what the file holds, and writes texts. It knows no page.
//
// It is told {do: "load", header}, {do: "chunk", text} for each block of base64, {do: "build"}, and then any number of
// times {do: "write", prompt, max_new_tokens, sampling, seed} or {do: "stop"}. It says {is: "loaded"}, {is: "reading", done,
// of}, {is: "text", text, count, context}, {is: "slid", kept}, {is: "end", reason, ...} and {is: "error", message}.

import { Model } from "/static/model.js";
import { RandomNumbers, choose } from "/static/sampling.js";
import { Tokenizer } from "/static/tokens.js";

const KINDS = { i1: Int8Array, i2: Int16Array, u1: Uint8Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
const PATIENCE_MS = 20; // how long the worker computes before it looks whether it was told something
const DAMAGED = "This file is damaged: ask for it again, or copy it again.";
const STOPPED = Symbol("stopped");

const channel = new MessageChannel();
const others = () =>
  new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });

let header, bytes, filled, model, tokenizer;
let text = 0; // the number of the text that is wanted

function load(its) {
  header = its;
  bytes = new Uint8Array(header.bytes);
  filled = 0;
}

function take(encoded) {
  const decoded = atob(encoded);
  if (filled + decoded.length > bytes.length) throw new Error(DAMAGED);
  for (let at = 0; at < decoded.length; at++) bytes[filled + at] = decoded.charCodeAt(at);
  filled += decoded.length;
}

function build() {
  if (filled !== bytes.length) throw new Error(DAMAGED);
  const parts = {};
  for (const [name, [kind, start, length]] of Object.entries(header.parts)) {
    parts[name] = new KINDS[kind](bytes.buffer, start, length);
  }
  const ends = parts.token_ends;
  tokenizer = new Tokenizer({
    tokens: Array.from(ends, (end, id) => parts.tokens.subarray(id ? ends[id - 1] : 0, end)),
    merges: parts.merges,
    special: parts.special,
    pattern: header.pattern,
    kinds: parts,
  });
  model = new Model(header.settings, matricesOf(parts));
  tell({ is: "loaded" });
}

// Put the levels and scales of each matrix into one object; vectors stay as they are.
function matricesOf(parts) {
  const found = {};
  for (const [name, part] of Object.entries(parts)) {
    const [, matrix, which] = name.match(/^(.+)\.(levels|scales)$/) ?? [];
    if (which === "levels") {
      const scales = parts[`${matrix}.scales`];
      found[matrix] = { levels: part, scales, size: part.length / scales.length };
    } else if (!which) found[name] = part;
  }
  return found;
}

// Return a prompt's ids, as infer has them: after the token with which texts start, where they do.
function idsOf(prompt) {
  const { start_id, starts_texts } = header.document_ids;
  const ids = tokenizer.encode(prompt);
  if (start_id !== null && (ids.length === 0 || (starts_texts && ids[0] !== start_id))) ids.unshift(start_id);
  if (ids.length === 0) throw new Error("Type how the text begins: this model knows no token at which texts start.");
  return ids;
}

// Return the last ids of a text that the model reads from position 0 on, after the one with which texts start, where they do.
function lastWindow(ids, size) {
  const { start_id, starts_texts } = header.document_ids;
  const starts = starts_texts && ids[0] === start_id && 1 < size && size < ids.length;
  return starts ? [start_id, ...ids.slice(1 - size)] : ids.slice(-size);
}

async function write({ prompt, max_new_tokens, sampling, seed }) {
  const number = ++text;
  const { context_length: room, num_layers } = header.settings;
  const all = idsOf(prompt);
  const window = lastWindow(all, room);
  const drawn = [];
  const read = tokenizer.reader();
  const numbers = new RandomNumbers(seed);
  let looked = performance.now(), begun;
  const pause = async (layer) => {
    if (performance.now() - looked < PATIENCE_MS) return;
    if (drawn.length === 0) tell({ is: "reading", done: layer, of: num_layers });
    await others();
    looked = performance.now();
    if (number !== text) throw STOPPED;
  };
  let reason = "limit";
  try {
    model.forget();
    let unread = window;
    while (drawn.length < max_new_tokens) {
      const logits = await model.read(unread, pause);
      const id = choose(logits, tokenizer.tokens.length, sampling, numbers);
      begun ??= performance.now();
      if (header.document_ids.ends.includes(id)) {
        reason = "end";
        break;
      }
      drawn.push(id);
      tell({ is: "text", text: read(id), count: drawn.length, context: model.length });
      unread = [id];
      if (model.length === room) {
        // The window is full: the last half of the text is read again, from position 0.
        const kept = Math.max(1, Math.floor(room / 2));
        model.forget();
        unread = lastWindow([...all, ...drawn], kept);
        tell({ is: "slid", kept: unread.length });
      }
    }
  } catch (error) {
    if (error !== STOPPED) throw error;
    reason = "stopped";
  }
  const seconds = (performance.now() - begun) / 1000; // without the reading of the prompt
  tell({ is: "end", reason, text: read(), count: drawn.length, seconds, prompt: all.length, read: window.length });
}

const tell = (message) => self.postMessage(message);

self.onmessage = async ({ data }) => {
  try {
    if (data.do === "load") load(data.header);
    else if (data.do === "chunk") take(data.text);
    else if (data.do === "build") build();
    else if (data.do === "write") await write(data);
    else text++; // stop: no text is wanted
  } catch (error) {
    tell({ is: "error", message: error.message });
  }
};
