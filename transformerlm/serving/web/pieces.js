// A text as pieces: the user's words, which have no ids yet, and tokens with ids, bytes and what the model thought.
//
// A piece is {text} or {text, id, of, bytes, logprob, top, made}; `of` is the fingerprint of the tokenizer whose id it is.
// A character may have several tokens: it is in the text of the last one, and the others have none.

const ENCODER = new TextEncoder();
const LIMITS = [0.5, 0.2, 0.1, 0.03, 0.01]; // below which a token has the next colour

// Return a token's bytes from how the API spells it: text, or bytes:\xe6\x97 where it is no whole character.
export function bytesOf(spelled) {
  if (/^bytes:(\\x[0-9a-f]{2})+$/.test(spelled)) {
    return Uint8Array.from(spelled.match(/\\x../g), (one) => parseInt(one.slice(2), 16));
  }
  return ENCODER.encode(spelled);
}

export const bytesOfHex = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));

// Give each token of a run of tokens its text. A field of HTML has one kind of line end, so its pieces have, too; the
// model is given ids, and those stay as they were.
export function spell(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  tokens.forEach((token, at) => {
    token.text = decoder.decode(token.bytes, { stream: at < tokens.length - 1 }).replace(/\r\n?/g, "\n");
  });
  return tokens;
}

// The same for pieces, in which the user's words may stand between tokens.
export function spellAll(pieces) {
  let tokens = [];
  for (const piece of [...pieces, null]) {
    if (piece?.id !== undefined) tokens.push(piece);
    else tokens = (spell(tokens), []);
  }
  return pieces;
}

export const textOf = (pieces) => pieces.map((piece) => piece.text).join("");

// Return the pieces before a place; what is left of a token that it cuts is the user's words.
export function before(pieces, place) {
  const kept = [];
  let at = 0;
  for (const piece of pieces) {
    if (at + piece.text.length > place) {
      while (kept.at(-1)?.text === "") kept.pop(); // the beginning of a character that is cut away
      if (place > at) kept.push({ text: piece.text.slice(0, place - at) });
      break;
    }
    kept.push(piece);
    at += piece.text.length;
  }
  return kept;
}

// Return the pieces of a text that the user has changed: what comes before the change stays, what comes after it are
// words, since the model would now think otherwise of them.
export function edited(pieces, text) {
  const old = textOf(pieces);
  if (old === text) return pieces;
  let same = 0;
  while (same < old.length && old[same] === text[same]) same++;
  const kept = before(pieces, same);
  const rest = text.slice(textOf(kept).length);
  if (rest) kept.push({ text: rest });
  return joined(kept);
}

// Put words beside each other into one piece.
export function joined(pieces) {
  const result = [];
  for (const piece of pieces) {
    const last = result.at(-1);
    if (piece.id === undefined && last && last.id === undefined) result[result.length - 1] = { text: last.text + piece.text };
    else if (piece.id !== undefined || piece.text) result.push(piece);
  }
  return result;
}

// Return the number of the piece that holds the character before a place; -1 where there is none.
export function pieceBefore(pieces, place) {
  let at = 0;
  for (const [number, piece] of pieces.entries()) {
    at += piece.text.length;
    if (place > 0 && at >= place && piece.text) return number;
  }
  return -1;
}


export function colourOf(piece) {
  if (piece.logprob == null) return "";
  const p = Math.exp(piece.logprob);
  const level = LIMITS.findIndex((limit) => p >= limit);
  return `made p${level < 0 ? LIMITS.length : level}`;
}

// Show pieces as coloured spans, reusing those that are there, since a text grows by a token at a time.
export function show(place, pieces) {
  pieces.forEach((piece, number) => {
    let span = place.children[number];
    if (!span) place.append((span = document.createElement("span")));
    if (span.textContent !== piece.text) span.textContent = piece.text;
    const colour = colourOf(piece);
    if (span.className !== colour) span.className = colour;
  });
  while (place.children.length > pieces.length) place.lastChild.remove();
}

// Return the tokens that one part of an answer brings; with echo those of the prompt come first.
export function tokensOf(choice, { echo = false } = {}) {
  const found = choice.logprobs;
  if (!found) return [];
  const prompt = (echo && choice.prompt_token_ids) || [];
  // The end of a text has a place in the lists, too, and no id.
  return [...prompt, ...(choice.token_ids ?? [])].map((id, at) => ({
    id,
    bytes: bytesOf(found.tokens[at]),
    text: "",
    logprob: found.token_logprobs[at],
    top: alternatives(found.top_logprobs[at], choice.top_token_ids?.[at]),
    made: at >= prompt.length,
  }));
}

function alternatives(logprobs, ids) {
  const entries = Object.entries(logprobs ?? {}).map(([spelled, logprob]) => ({ spelled, logprob, id: ids?.[spelled] }));
  return entries.sort((a, b) => b.logprob - a.logprob);
}

// Return a token as people can read it: spaces and line breaks seen, hex where it is no whole character.
export function readable(bytes) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\p{Cc}\p{Cf}]/gu, hexOfText);
  } catch {
    return hexOf(bytes);
  }
}

export const hexOf = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
const hexOfText = (text) => `[${hexOf(ENCODER.encode(text))}]`;
