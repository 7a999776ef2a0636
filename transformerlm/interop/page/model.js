// The Transformer of transformerlm.models, for one text: ids in, the logits after the last of them out.
//
// Vectors are Float32Arrays, one row after the other.

import { multiply } from "/static/matrix.js";

export class Model {
  // `settings` are those of the model; `parts` are its matrices and vectors by their names (see html.py).
  constructor(settings, parts) {
    this.settings = settings;
    this.parts = parts;
    this.headSize = settings.d_head;
    this.queryWidth = settings.num_heads * this.headSize;
    this.cacheWidth = settings.num_kv_heads * this.headSize;
    const size = settings.context_length * this.cacheWidth;
    const make = () => Array.from({ length: settings.num_layers }, () => new Float32Array(size));
    this.keys = make();
    this.values = make();
    this.length = 0; // the number of ids read
    this.turns = parts.frequencies && rotations(parts.frequencies, settings.context_length);
  }

  // Read ids after those read so far, and return the logits after the last one. `pause` is awaited after each layer
  // with the number of layers done; what it throws ends the reading.
  async read(ids, pause) {
    const { num_layers, norm_position, logit_soft_cap } = this.settings;
    let x = this.embed(ids);
    for (let layer = 0; layer < num_layers; layer++) {
      x = norm_position === "post" ? this.postBlock(x, layer, ids.length) : this.block(x, layer, ids.length);
      await pause(layer + 1);
    }
    this.length += ids.length;
    const last = x.subarray(x.length - this.settings.d_model);
    const logits = multiply(this.parts.head, norm_position === "pre" ? this.normed(last, this.parts.ln_final) : last, 1);
    return logit_soft_cap ? logits.map((logit) => logit_soft_cap * Math.tanh(logit / logit_soft_cap)) : logits;
  }

  forget() {
    this.length = 0;
  }

  embed(ids) {
    const width = this.settings.d_model;
    const x = new Float32Array(ids.length * width);
    ids.forEach((id, row) => x.set(this.parts.embedding.subarray(id * width, (id + 1) * width), row * width));
    return x;
  }

  block(x, layer, count) {
    const isPre = this.settings.norm_position === "pre";
    const normed = (rows, name) => (isPre ? this.normed(rows, this.parts[`${layer}.${name}`]) : rows);
    const between = added(x, this.attention(normed(x, "ln1"), layer, count));
    return added(between, this.feedForward(normed(between, "ln2"), layer, count));
  }

  postBlock(x, layer, count) {
    const between = this.normed(added(x, this.attention(x, layer, count)), this.parts[`${layer}.ln1`]);
    return this.normed(added(between, this.feedForward(between, layer, count)), this.parts[`${layer}.ln2`]);
  }

  // Divide each row by the root of its sum of squares plus d_model * norm_eps, and multiply it by the gain.
  normed(x, gain) {
    const { d_model: width, norm_eps } = this.settings;
    const result = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += width) {
      let squares = width * norm_eps;
      for (let at = 0; at < width; at++) squares += x[start + at] * x[start + at];
      const size = Math.sqrt(squares);
      for (let at = 0; at < width; at++) result[start + at] = (x[start + at] / size) * gain[at];
    }
    return result;
  }

  feedForward(x, layer, count) {
    const { ffn, d_ff } = this.settings;
    const up = multiply(this.parts[`${layer}.up`], x, count);
    const inner = new Float32Array(count * d_ff);
    const width = ffn === "swiglu" ? 2 * d_ff : d_ff; // swiglu: the gates of a row, then what they let through
    for (let row = 0; row < count; row++) {
      for (let at = 0; at < d_ff; at++) {
        const gate = up[row * width + at];
        const silu = Math.fround(gate / (1 + Math.exp(-gate)));
        inner[row * d_ff + at] = ffn === "swiglu" ? silu * up[row * width + d_ff + at] : silu;
      }
    }
    return multiply(this.parts[`${layer}.down`], inner, count);
  }

  attention(x, layer, count) {
    const { num_heads } = this.settings;
    const { queryWidth, cacheWidth } = this;
    const width = queryWidth + 2 * cacheWidth;
    const qkv = multiply(this.parts[`${layer}.qkv`], x, count);
    const mixed = new Float32Array(count * queryWidth);
    for (let row = 0; row < count; row++) {
      const position = this.length + row;
      const own = qkv.subarray(row * width, (row + 1) * width);
      this.turn(own.subarray(0, queryWidth + cacheWidth), layer, position);
      this.keys[layer].set(own.subarray(queryWidth, queryWidth + cacheWidth), position * cacheWidth);
      this.values[layer].set(own.subarray(queryWidth + cacheWidth), position * cacheWidth);
      for (let head = 0; head < num_heads; head++) {
        const start = head * this.headSize;
        this.mix(own.subarray(start, start + this.headSize), layer, head, position + 1, mixed, row * queryWidth + start);
      }
    }
    return multiply(this.parts[`${layer}.output`], mixed, count);
  }

  // Norm the heads of queries and keys, each by itself, and rotate their pairs of features, in place.
  turn(heads, layer, position) {
    const size = this.headSize;
    const gains = this.parts[`${layer}.head_gains`];
    for (let start = 0; start < heads.length; start += size) {
      if (gains) {
        let squares = 0;
        for (let at = 0; at < size; at++) squares += heads[start + at] * heads[start + at];
        const root = Math.sqrt(squares / size + this.settings.norm_eps);
        for (let at = 0; at < size; at++) heads[start + at] = (heads[start + at] / root) * gains[start + at];
      }
      if (!this.turns) continue;
      for (let pair = 0; pair < size / 2; pair++) {
        const cos = this.turns.cos[(position * size) / 2 + pair];
        const sin = this.turns.sin[(position * size) / 2 + pair];
        const even = heads[start + 2 * pair], odd = heads[start + 2 * pair + 1];
        heads[start + 2 * pair] = even * cos - odd * sin;
        heads[start + 2 * pair + 1] = even * sin + odd * cos;
      }
    }
  }

  // Write the mean of the first `length` values, weighted by how well their keys answer the query, to `mixed`.
  mix(query, layer, head, length, mixed, place) {
    const size = this.headSize;
    const { num_heads, num_kv_heads } = this.settings;
    const first = Math.floor(head / (num_heads / num_kv_heads)) * size; // consecutive heads share keys and values
    const keys = this.keys[layer], values = this.values[layer];
    const scores = new Float64Array(length);
    let highest = -Infinity;
    for (let position = 0; position < length; position++) {
      let score = 0;
      const start = position * this.cacheWidth + first;
      for (let at = 0; at < size; at++) score += query[at] * keys[start + at];
      scores[position] = score / Math.sqrt(size);
      if (scores[position] > highest) highest = scores[position];
    }
    const sums = new Float64Array(size);
    let total = 0;
    for (let position = 0; position < length; position++) {
      const share = Math.exp(scores[position] - highest);
      const start = position * this.cacheWidth + first;
      total += share;
      for (let at = 0; at < size; at++) sums[at] += share * values[start + at];
    }
    for (let at = 0; at < size; at++) mixed[place + at] = sums[at] / total;
  }
}

function added(x, y) {
  const sum = new Float32Array(x.length);
  for (let at = 0; at < x.length; at++) sum[at] = x[at] + y[at];
  return sum;
}

// Return the cosines and sines of each position's angles; a frequency is what a pair turns from one to the next.
function rotations(frequencies, length) {
  const cos = new Float32Array(length * frequencies.length);
  const sin = new Float32Array(length * frequencies.length);
  for (let position = 0; position < length; position++) {
    frequencies.forEach((frequency, pair) => {
      cos[position * frequencies.length + pair] = Math.cos(position * frequency);
      sin[position * frequencies.length + pair] = Math.sin(position * frequency);
    });
  }
  return { cos, sin };
}
