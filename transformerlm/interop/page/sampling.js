// From logits to the next id, as transformerlm.inference.sampling does it, with the same random numbers: a seed gives
// the text that transformerlm-infer gives for it.

const LENGTH = 624, MIDDLE = 397;
const SMALLEST = 2 ** -126; // of normal float32 numbers: a temperature that rounds to 0 divides nothing

// Random numbers in [0, 1) of 53 bits: torch's, which are those of Matsumoto and Nishimura's MT19937 (1998).
export class RandomNumbers {
  constructor(seed) {
    this.state = new Uint32Array(LENGTH);
    this.state[0] = Number(BigInt(seed) & 0xffffffffn);
    for (let at = 1; at < LENGTH; at++) {
      const before = this.state[at - 1] ^ (this.state[at - 1] >>> 30);
      this.state[at] = Math.imul(1812433253, before) + at;
    }
    this.next = LENGTH;
  }

  take() {
    const high = this.word() & 0x1fffff; // 21 bits, and 32 more
    return (high * 2 ** 32 + this.word()) / 2 ** 53;
  }

  word() {
    if (this.next === LENGTH) this.renew();
    let word = this.state[this.next++];
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return (word ^ (word >>> 18)) >>> 0;
  }

  renew() {
    const state = this.state;
    for (let at = 0; at < LENGTH; at++) {
      const mixed = (state[at] & 0x80000000) | (state[(at + 1) % LENGTH] & 0x7fffffff);
      state[at] = state[(at + MIDDLE) % LENGTH] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}

// Return the next of the ids below `count`. The sampling's temperature, top_k (0: all), top_p and min_p are those of
// the TOML files. Throws where no id can be drawn.
export function choose(logits, count, { temperature, top_k, top_p, min_p }, numbers) {
  let best = 0;
  for (let id = 0; id < count; id++) {
    if (!Number.isFinite(logits[id])) throw new Error("The model's numbers are not finite: its weights may be damaged.");
    if (logits[id] > logits[best]) best = id;
  }
  if (temperature === 0 || top_p === 0) return best;
  const weights = new Float32Array(count); // probabilities, divided by that of the most likely id
  const divisor = Math.max(Math.fround(temperature), SMALLEST);
  for (let id = 0; id < count; id++) weights[id] = Math.exp(Math.fround(Math.fround(logits[id] - logits[best]) / divisor));
  if (!top_k && top_p === 1) {
    for (let id = 0; id < count; id++) if (weights[id] < Math.fround(min_p)) weights[id] = 0;
    return draw(weights, numbers.take());
  }
  // The most likely first, of equals the lower id, which a stable sort keeps first.
  const kept = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]).slice(0, top_k || count);
  const total = kept.reduce((sum, id) => sum + weights[id], 0);
  let before = 0;
  let size = kept.findIndex((id, place) => {
    const isDropped = place > 0 && before >= top_p * total;
    before += weights[id];
    return isDropped;
  });
  if (size < 0 || top_p === 1) size = kept.length;
  const ordered = kept.slice(0, size).map((id) => (weights[id] < Math.fround(min_p) ? 0 : weights[id]));
  return kept[draw(ordered, numbers.take())];
}

// Return where the sum of the weights passes a share of it.
function draw(weights, share) {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let sum = 0;
  const place = weights.findIndex((weight) => (sum += weight) > share * total);
  return place < 0 ? weights.length - 1 : place;
}
