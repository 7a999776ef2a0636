// The tab Runs: the runs of a directory while they train. What it shows is in runs_view.js; here is how it asks for it.

import { ask, askJson, events } from "/static/api.js";
import { byId, say } from "/static/dom.js";
import { chooseAll, chosenNames, refresh, showList, showRuns } from "/static/runs_view.js";

const CHOSEN = "transformerlm.runs";
const RETRY_MS = 2000;
const MOST_ADDED = 4000; // lines to what was read at first, after which a run is read anew, so that of a long one no more are held
const START = { file: "", offset: 0, every: 0, most: Infinity };
const places = new WeakMap(); // a run's lines -> where in its file they end, and how many may be held
let watching = null;
let first = [];

const server = {
  // Only what is new is fetched.
  async fill(lines) {
    let isNew = false;
    for (let more = true; more; ) {
      const known = places.get(lines) ?? START;
      const isTooLong = lines.clock.steps.length > known.most;
      const { most, ...place } = isTooLong ? START : known;
      const { file, offset, every, ...found } = await askJson(`/api/lines?${new URLSearchParams({ run: lines.name, ...place })}`);
      const isAnew = found.reset || isTooLong;
      if (isAnew) lines.clear();
      isNew ||= isAnew || found.lines.length > 0;
      for (const line of found.lines) lines.add(line);
      more = found.more;
      const limit = isAnew ? Infinity : most; // until all has been read once
      places.set(lines, { file, offset, every, most: !more && limit === Infinity ? 2 * lines.clock.steps.length + MOST_ADDED : limit });
    }
    return isNew;
  },
  config: (name) => askJson(`/api/run?${new URLSearchParams({ run: name })}`),
};

async function list() {
  const { runs } = await askJson("/api/runs");
  first = runs.slice(0, 1).map((run) => run.name);
  showList(runs);
  say("runs-status", runs.length ? "" : "There are no runs here yet. transformerlm-train writes them; web.runs_dir says where.");
}

// Listen while the tab is seen. A browser opens few connections to one server, so a tab in the background has none.
async function watch(signal) {
  while (!signal.aborted) {
    try {
      const response = await ask("/api/events", { signal });
      await list();
      await refresh(chosenNames());
      for await (const { event, data } of events(response)) {
        if (event !== "grown") continue;
        await list();
        await refresh(data.runs);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      say("runs-status", error.message, true);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function begin(signal) {
  try {
    await list();
    await chooseAll(JSON.parse(sessionStorage.getItem(CHOSEN) ?? "null") ?? (chosenNames().length ? [] : first));
  } catch (error) {
    say("runs-status", error.message, true);
  }
  await watch(signal);
}

export function open() {
  if (watching || document.hidden) return;
  watching = new AbortController();
  begin(watching.signal);
}

export function close() {
  watching?.abort();
  watching = null;
}

showRuns(server, (names) => sessionStorage.setItem(CHOSEN, JSON.stringify(names)));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) close();
  else if (!byId("runs").hidden) open();
});
