// Asking for text: pieces in, tokens out as they come. Prompts go as ids: text that the model made would get other ids
// if it were tokenized again.

import { ask, askJson, events } from "/static/api.js";
import { bytesOf, bytesOfHex, joined, spellAll, tokensOf } from "/static/pieces.js";
import { cardOf } from "/static/settings.js";

const NUM_ALTERNATIVES = 10;
const numAlternatives = (model) => Math.min(NUM_ALTERNATIVES, cardOf(model)?.max_logprobs ?? NUM_ALTERNATIVES);
let start = null;
let tokenizer = null; // whose ids are meant: another model may be served here by now

// Return the pieces with the user's words as tokens, too; ids of another tokenizer become words before.
export async function withIds(pieces, signal) {
  const of = (await askJson("/tokenizer_info", { signal })).fingerprint;
  if (of !== tokenizer) [tokenizer, start] = [of, null];
  const result = [];
  for (const piece of joined(pieces.map((one) => (one.of === of ? one : { text: one.text })))) {
    if (piece.id !== undefined) result.push({ ...piece }); // a copy: its text may change, and Undo has the old one
    else if (piece.text) {
      const body = { prompt: piece.text, add_special_tokens: false, allow_special: false };
      const found = await askJson("/tokenize", { body, signal });
      result.push(...found.tokens.map((id, at) => ({ id, of, bytes: bytesOfHex(found.bytes[at]), text: "", made: false })));
    }
  }
  return spellAll(result);
}

// Return the id that each text of this model begins with, in a list; an empty one where there is none.
async function startIds() {
  start ??= askJson("/tokenizer_info").then(async (info) => {
    if (!info.add_bos_token || info.bos_token == null) return [];
    const body = { prompt: info.bos_token, add_special_tokens: false, allow_special: true };
    return (await askJson("/tokenize", { body })).tokens;
  });
  start.catch(() => (start = null));
  return start;
}

// Return a prompt that fits the model's context with the tokens that are asked for, and how many of its ids are cut off.
export async function promptOf(pieces, room) {
  const first = await startIds();
  const num_cut = Math.max(0, first.length + pieces.length - room);
  const ids = [...first, ...pieces.slice(num_cut).map((piece) => piece.id)];
  return { prompt: ids.length ? ids : "", num_cut };
}

// Ask for text and call `onTokens(index, tokens)` as it comes. Returns {seed, step, finish}.
export async function complete(body, { signal, onTokens }) {
  const asked = { ...body, logprobs: numAlternatives(body.model), return_token_ids: true, stream: true };
  const told = { seed: body.seed, finish: [] };
  for await (const { data } of events(await ask("/v1/completions", { body: asked, signal }))) {
    if (data.error) throw new Error(data.error.message);
    for (const choice of data.choices) {
      if (choice.step !== undefined) told.step = choice.step;
      if (choice.finish_reason) told.finish[choice.index] = choice.finish_reason;
      onTokens(choice.index, tokensOf(choice).map((one) => ({ ...one, of: tokenizer })));
    }
  }
  return told;
}

// Return the tokens of a prompt with what the model thinks of each; the first one has nothing before it.
export async function scored(pieces, model, context, signal) {
  const { prompt, num_cut } = await promptOf(pieces, context);
  const body = { model, prompt, echo: true, max_tokens: 0, logprobs: numAlternatives(model), return_token_ids: true };
  const answer = await askJson("/v1/completions", { body, signal });
  const found = tokensOf(answer.choices[0], { echo: true });
  const shift = pieces.length - found.length; // a start token of the prompt is none of ours
  return {
    num_cut,
    pieces: pieces.map((piece, at) => {
      const one = found[at - shift];
      return one ? { ...piece, logprob: one.logprob, top: one.top } : { ...piece, logprob: undefined, top: undefined };
    }),
  };
}

// Return an alternative to a token as a piece that follows the ones before it.
export function chosen(one, { top, of }) {
  const bytes = bytesOf(one.spelled);
  if (one.id === undefined) return { text: new TextDecoder().decode(bytes) };
  return { id: one.id, of, bytes, text: "", logprob: one.logprob, top, made: true };
}
