// The lines of one run as columns. What was read once is kept; only what is new is fetched.

import { askJson } from "/static/api.js";

export const METRICS = { loss: "metrics.loss", val_loss: "metrics.val_loss", lr: "metrics.lr",
  grad_norm: "metrics.grad_l2_norm", tokens_per_second: "metrics.tokens_per_second" };
const MARKED = { step_skipped: "skipped", rolled_back: "rolled back to", resumed: "resumed at" };

export class RunLines {
  constructor(name) {
    this.name = name;
    this.place = { file: "", offset: 0, every: 0 };
    this.updating = null;
    this.again = false;
    this.clear();
  }

  clear() {
    this.columns = { step: [], tokens: [], hours: [], flops: [] };
    for (const metric of Object.keys(METRICS)) this.columns[metric] = [];
    this.samples = new Map(); // prompt -> [{step, text}]
    this.events = []; // {step, words, reason}
    this.flopsPerToken = null;
    this.now = { step: 0, tokens: 0, hours: 0 };
  }

  // Fetch what is new; returns whether there was anything. Calls meanwhile lead to one more look.
  async update() {
    this.again = true;
    this.updating ??= this.read().finally(() => (this.updating = null));
    return this.updating;
  }

  async read() {
    let isNew = false;
    while (this.again) {
      this.again = false;
      let more = true;
      while (more) {
        const query = new URLSearchParams({ run: this.name, ...this.place });
        const found = await askJson(`/api/lines?${query}`);
        if (found.reset) this.clear();
        isNew ||= found.reset || found.lines.length > 0;
        this.place = { file: found.file, offset: found.offset, every: found.every };
        for (const line of found.lines) this.add(line);
        more = found.more;
      }
    }
    return isNew;
  }

  add(line) {
    if (line.event === "started") this.flopsPerToken = line.flops_per_token ?? null;
    if (line.event === "sample") this.addSample(line);
    if (line.event in MARKED) {
      const words = `${MARKED[line.event]} step ${line.step}`;
      this.events.push({ step: line.step, kind: line.event, words: line.reason ? `${words}: ${line.reason}` : words });
    }
    if (line.event !== undefined || typeof line.step !== "number") return;
    if (line.step < this.now.step) this.forgetAfter(line.step);
    const { now, columns } = this;
    const tokens = line["metrics.tokens"] ?? now.tokens;
    const rate = line["metrics.tokens_per_second"];
    if (rate > 0 && tokens > now.tokens) now.hours += (tokens - now.tokens) / rate / 3600; // lines have no clock
    now.step = line.step;
    now.tokens = tokens;
    columns.step.push(line.step);
    columns.tokens.push(tokens);
    columns.hours.push(now.hours);
    columns.flops.push(this.flopsPerToken === null ? null : tokens * this.flopsPerToken);
    for (const [metric, key] of Object.entries(METRICS)) columns[metric].push(line[key] ?? null);
  }

  addSample(line) {
    const prompt = String(line["text.prompt"] ?? "");
    const list = this.samples.get(prompt) ?? [];
    list.push({ step: line.step, text: String(line["text.output"] ?? "") });
    this.samples.set(prompt, list);
  }

  // Drop the steps from `step` on, which the run makes again after a rollback.
  forgetAfter(step) {
    const { step: steps } = this.columns;
    let count = steps.length;
    while (count && steps[count - 1] >= step) count--;
    for (const column of Object.values(this.columns)) column.length = count;
    this.now.tokens = this.columns.tokens[count - 1] ?? 0; // the hours go on
  }

  // Return the number of the last line at or before a step.
  indexOf(step) {
    const { step: steps } = this.columns;
    let low = 0;
    let high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return Math.max(0, low - 1);
  }

  // Return where a step is on another axis.
  xOf(step, axis) {
    return axis === "step" ? step : this.columns[axis][this.indexOf(step)];
  }
}

// Return a moving mean that gives each earlier value `weight` as much, from values of which some are missing.
export function smoothed(values, weight) {
  let mean = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total; // so that the first values are not drawn to 0
  });
}
