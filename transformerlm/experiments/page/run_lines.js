// The lines of one run as curves. A source fills them: a server, line by line, or a report, all at once.

export const METRICS = { loss: "metrics.loss", val_loss: "metrics.val_loss", bits_per_byte: "metrics.val_bits_per_byte", lr: "metrics.lr",
  grad_norm: "metrics.grad_l2_norm", tokens_per_second: "metrics.tokens_per_second", memory: "memory.peak_bytes" };
const WORDS = { started: "started at", resumed: "resumed at", checkpoint_saved: "saved a checkpoint at", step_skipped: "skipped",
  rolled_back: "rolled back to", requeue: "asked to be queued again at", finished: "finished at", failed: "failed at" };

// Numbers that are not finite are words in JSON; no curve goes there.
const numberOf = (value) => (typeof value === "number" ? value : null);

export class RunLines {
  constructor(name, source) {
    this.name = name;
    this.source = source;
    this.updating = null;
    this.again = false;
    this.starts = 0; // grows when the run is started or resumed, which may have changed its configuration
    this.clear();
  }

  clear() {
    this.starts++;
    this.curves = {}; // metric -> {steps, values, means}; means, where there are any, are {steps, values} of many lines each
    for (const metric of Object.keys(METRICS)) this.curves[metric] = { steps: [], values: [], means: null };
    this.clock = { steps: [0], tokens: [0], seconds: [0] };
    this.samples = new Map(); // prompt -> [{step, text}]
    this.events = []; // {step, kind, words}
    this.started = {};
    this.batches = []; // [step, tokens of a step] of each start
    this.environment = {};
    this.now = { step: 0, tokens: 0, seconds: 0 };
  }

  // Take what is new; returns whether there was anything. Calls meanwhile lead to one more look.
  async update() {
    this.again = true;
    this.updating ??= this.read().finally(() => (this.updating = null));
    return this.updating;
  }

  async read() {
    let isNew = false;
    while (this.again) {
      this.again = false;
      isNew = (await this.source.fill(this)) || isNew;
    }
    return isNew;
  }

  add(line) {
    if (line.event !== undefined) return this.addEvent(line);
    if (typeof line.step !== "number") return;
    if (line.step < this.now.step) this.forgetAfter(line.step);
    const { now, clock } = this;
    const tokens = numberOf(line["metrics.tokens"]) ?? now.tokens;
    const rate = line["metrics.tokens_per_second"];
    // Runs of earlier versions have no clock in their lines: the time follows from the rate.
    if (typeof line["time.elapsed_s"] === "number") now.seconds = line["time.elapsed_s"];
    else if (rate > 0 && tokens > now.tokens) now.seconds += (tokens - now.tokens) / rate;
    now.step = line.step;
    now.tokens = tokens;
    clock.steps.push(line.step);
    clock.tokens.push(tokens);
    clock.seconds.push(now.seconds);
    for (const [metric, key] of Object.entries(METRICS)) {
      if (line[key] === undefined) continue;
      this.curves[metric].steps.push(line.step);
      this.curves[metric].values.push(numberOf(line[key]));
    }
  }

  addEvent(line) {
    if (line.event === "started") {
      this.started = line;
      if (numberOf(line.tokens_per_step) !== null && numberOf(line.step) !== null) this.batches.push([this.batches.length ? line.step : 0, line.tokens_per_step]);
    }
    if (line.event === "started" || line.event === "resumed") this.starts++;
    if (line.event === "environment") this.environment = line;
    if (line.event === "sample") this.addSample(line.step, String(line["text.prompt"] ?? ""), String(line["text.output"] ?? ""));
    if (!Object.hasOwn(WORDS, line.event) || typeof line.step !== "number") return;
    const words = `${WORDS[line.event]} step ${line.step}`;
    const why = line.reason ?? line.signal ?? line.error;
    this.events.push({ step: line.step, kind: line.event, words: why ? `${words}: ${why}` : words });
  }

  addSample(step, prompt, text) {
    const list = this.samples.get(prompt) ?? [];
    list.push({ step, text });
    this.samples.set(prompt, list);
  }

  // Drop the steps from `step` on, which the run makes again after a rollback.
  forgetAfter(step) {
    for (const curve of [...Object.values(this.curves), this.clock]) {
      let count = curve.steps.length;
      while (count && curve.steps[count - 1] >= step) count--;
      for (const column of Object.values(curve)) if (Array.isArray(column)) column.length = count;
    }
    this.now.tokens = this.clock.tokens.at(-1) ?? 0; // the time goes on
  }

  // Return where steps in ascending order are on an axis: steps, tokens, seconds or FLOPs; between two lines, by proportion.
  places(steps, axis) {
    if (axis === "step") return steps;
    const column = axis === "seconds" ? this.clock.seconds : this.clock.tokens;
    const factor = axis === "flops" ? (numberOf(this.started.flops_per_token) ?? NaN) : 1;
    if (axis === "flops" && this.batches.length) return steps.map((step) => finite(factor * this.computed(step)));
    let at = 0;
    return steps.map((step) => {
      while (at + 2 < this.clock.steps.length && this.clock.steps[at + 1] < step) at++;
      return finite(factor * between(this.clock.steps, column, at, step));
    });
  }

  // Return how many tokens were computed up to a step, learnt or not.
  computed(step) {
    return this.batches.reduce((sum, [begin, each], at) => {
      const end = this.batches[at + 1]?.[0] ?? Infinity;
      return sum + each * Math.max(0, Math.min(step, end) - begin);
    }, 0);
  }
}

const finite = (place) => (Number.isFinite(place) ? place : null);

function between(steps, column, at, step) {
  if (at + 1 >= steps.length || step <= steps[at]) return column[at];
  const part = Math.min(1, (step - steps[at]) / (steps[at + 1] - steps[at]));
  return part === 1 ? column[at + 1] : column[at] + part * (column[at + 1] - column[at]);
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
