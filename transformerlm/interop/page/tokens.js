// Text to ids and back, as transformerlm.tokenizer does it: pre-tokens, then merges of bytes.

// How a text is cut, as in pretokenize.py. L, N and S are the letters, numbers and white space of the export's table
// of Unicode, so that a text is cut in the same places whatever the browser's own table is.
const NEARLY_GPT4 = ({ L, N, S }, digits, lastSpaces) =>
  `'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\\r\\n${L}${N}]?[${L}]+|[${N}]${digits}| ?[^${S}${L}${N}]+[\\r\\n]*` +
  `${lastSpaces}|[${S}]*[\\r\\n]|[${S}]+(?![^${S}])|[${S}]`;
const PATTERNS = {
  gpt2: ({ L, N, S }) => `'(?:[sdmt]|ll|ve|re)| ?[${L}]+| ?[${N}]+| ?[^${S}${L}${N}]+|[${S}]+(?![^${S}])|[${S}]+`,
  cl100k: (kinds) => NEARLY_GPT4(kinds, "{1,3}", `|[${kinds.S}]+$`),
  llama3: (kinds) => NEARLY_GPT4(kinds, "{1,3}", ""),
  qwen2: (kinds) => NEARLY_GPT4(kinds, "", ""),
  smollm: ({ L, N, S }) =>
    `[${N}]|'(?:[sdmt]|ll|ve|re)| ?[${L}]+| ?[^${S}${L}${N}]+|[${S}]+(?![^${S}${N}])|[${S}]+`,
};
const MOST_IDS = 2 ** 26; // so that a pair of ids is a whole number

export class Tokenizer {
  // `tokens` are the bytes of each id, `merges` triples of ids (left, right, made) in the order they were learned,
  // `special` the ids of special tokens.
  constructor({ tokens, merges, special, pattern, kinds }) {
    this.tokens = tokens;
    this.special = new Set(special);
    this.pattern = new RegExp(PATTERNS[pattern](classes(kinds)), "gu");
    this.byteIds = new Int32Array(256);
    tokens.forEach((token, id) => {
      if (token.length === 1) this.byteIds[token[0]] = id;
    });
    this.ranks = new Map();
    for (let at = 0; at < merges.length; at += 3) {
      this.ranks.set(merges[at] * MOST_IDS + merges[at + 1], { rank: at, made: merges[at + 2] });
    }
  }

  // Return the ids of a text in which special tokens are nothing special.
  encode(text) {
    const encoder = new TextEncoder();
    const pieces = text.isWellFormed?.() === false ? text.toWellFormed() : text;
    return (pieces.match(this.pattern) ?? []).flatMap((piece) => this.merge([...encoder.encode(piece)]));
  }

  // Join neighbours as the merges say, the first learned merge first.
  merge(bytes) {
    let ids = bytes.map((byte) => this.byteIds[byte]);
    for (;;) {
      let next;
      for (let at = 0; at + 1 < ids.length; at++) {
        const found = this.ranks.get(ids[at] * MOST_IDS + ids[at + 1]);
        if (found && (!next || found.rank < next.rank)) next = found;
      }
      if (!next) return ids;
      const joined = [];
      for (let at = 0; at < ids.length; at++) {
        const isPair = at + 1 < ids.length && this.ranks.get(ids[at] * MOST_IDS + ids[at + 1]) === next;
        joined.push(isPair ? next.made : ids[at]);
        if (isPair) at++;
      }
      ids = joined;
    }
  }

  // Return a function that takes ids, one at a time, and returns the text that is certain by then: the bytes of a part
  // of a character wait for the rest, and a special token has no text. Without an id it returns what still waits.
  reader() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return (id) => {
      if (id === undefined) return decoder.decode();
      return this.special.has(id) ? "" : decoder.decode(this.tokens[id], { stream: true });
    };
  }
}

// Return the insides of three character classes from their ranges: first and last code point, one after the other.
function classes(kinds) {
  const spelled = (ranges) => {
    const one = (code) => `\\u{${code.toString(16)}}`;
    let text = "";
    for (let at = 0; at < ranges.length; at += 2) text += `${one(ranges[at])}-${one(ranges[at + 1])}`;
    return text;
  };
  return { L: spelled(kinds.letters), N: spelled(kinds.numbers), S: spelled(kinds.spaces) };
}
