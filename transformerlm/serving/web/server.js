// The tab Server: how the server does, from /health and /metrics, and its last minutes as curves.

import { ask } from "/static/api.js";
import { byId, say, showNumbers, whole } from "/static/dom.js";
import { Chart } from "/static/chart.js";

const EACH_MS = 1000;
const KEPT = 300;
const columns = { seconds: [], rate: [], running: [], waiting: [] };
let charts = null;
let timer = 0;
let visit = 0; // how often the tab was opened: what an earlier visit still waits for looks no further
let last = null;

// Return the numbers of Prometheus's text as {name: sum over its labels}, buckets as {name: [[limit, count]]}.
export function parseMetrics(text) {
  const sums = {};
  const buckets = {};
  for (const line of text.split("\n")) {
    const found = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const [, name, labels, value] = found;
    const limit = /le="([^"]+)"/.exec(labels ?? "")?.[1];
    if (limit) (buckets[name.replace(/_bucket$/, "")] ??= []).push([limit === "+Inf" ? Infinity : Number(limit), Number(value)]);
    else sums[name] = (sums[name] ?? 0) + Number(value);
  }
  return { sums, buckets };
}

// Return the limit below which half of what was observed lies.
export function median(buckets) {
  const count = buckets?.at(-1)?.[1];
  return count ? buckets.find(([, below]) => below >= count / 2)[0] : null;
}

const below = (limit) => (limit === null ? "–" : limit === Infinity ? "> 60 s" : limit < 1 ? `≤ ${1000 * limit} ms` : `≤ ${limit} s`);

async function look(own) {
  try {
    const health = await (await ask("/health", { anyStatus: true })).json();
    const { sums, buckets } = parseMetrics(await (await ask("/metrics")).text());
    if (own !== visit) return;
    show(health, (name) => sums[`transformerlm_${name}`] ?? 0, (name) => buckets[`transformerlm_${name}`]);
  } catch (error) {
    say("server-status", error.message, true);
  }
  if (timer && own === visit) timer = setTimeout(look, EACH_MS, own);
}

function show(health, sum, buckets) {
  const now = { seconds: performance.now() / 1000, tokens: sum("generated_tokens_total") };
  // A server that was started again counts from 0.
  const rate = last && now.tokens >= last.tokens ? (now.tokens - last.tokens) / (now.seconds - last.seconds) : null;
  last = now;
  const words = { ok: "Ready", loading: "Loads the model", draining: "Ends", dead: "Starts again", stalled: "Stalled" };
  say("server-status", health.status === "ok" ? "" : `${words[health.status] ?? health.status}.`, health.status !== "ok");
  showNumbers(byId("server-numbers"), [
    ["State", words[health.status] ?? health.status],
    ["Tokens a second", rate === null ? "–" : whole(rate)],
    ["Slots in use", `${health.running} of ${health.slots}`],
    ["Waiting", whole(health.waiting)],
    ["Texts", whole(sum("requests_total"))],
    ["Refused", whole(sum("requests_rejected_total"))],
    ["Tokens generated", whole(sum("generated_tokens_total"))],
    ["Prompt tokens read", whole(sum("prompt_tokens_total"))],
    ["Prompt tokens reused", whole(sum("reused_tokens_total"))],
    ["In the queue, median", below(median(buckets("queue_seconds")))],
    ["First token, median", below(median(buckets("time_to_first_token_seconds")))],
    ["Between tokens, median", below(median(buckets("inter_token_seconds")))],
    ["Restarts · reloads", `${health.restarts} · ${health.reloads}`],
  ]);
  for (const [name, value] of Object.entries({ seconds: now.seconds, rate, running: health.running, waiting: health.waiting })) {
    columns[name].push(value);
    if (columns[name].length > KEPT) columns[name].shift();
  }
  draw();
}

function draw() {
  charts ??= [new Chart(byId("server-charts"), "Tokens a second"), new Chart(byId("server-charts"), "Texts")];
  const xs = columns.seconds.map((one) => one - columns.seconds.at(-1));
  const options = { xLabel: "seconds ago", leastTop: 1, xRange: [-KEPT, 0] };
  charts[0].draw([{ name: "tokens a second", colour: 0, xs, ys: columns.rate }], options);
  charts[1].draw([
    { name: "running", colour: 0, xs, ys: columns.running },
    { name: "waiting", colour: 1, xs, ys: columns.waiting },
  ], options);
}

export function open() {
  if (timer) return;
  timer = -1;
  look(++visit);
}

export function close() {
  clearTimeout(timer);
  timer = 0;
}
