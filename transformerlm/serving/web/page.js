// The page: its tabs, and what all of them show of the server.

import { askJson } from "/static/api.js";
import { byId, say, whole } from "/static/dom.js";
import * as runs from "/static/runs.js";
import * as server from "/static/server.js";
import * as settings from "/static/settings.js";
import * as tokens from "/static/tokens_tab.js";
import * as write from "/static/write.js";

const PARTS = { write: null, tokens, runs, server };
const LOOK_MS = 10_000;
const RETRY_MS = 1000;
const tabs = [...document.querySelectorAll("[role=tab]")];

function open(name, { focus = false } = {}) {
  for (const tab of tabs) {
    const isIt = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isIt));
    tab.tabIndex = isIt ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !isIt;
    if (isIt && focus) tab.focus();
  }
  for (const [other, part] of Object.entries(PARTS)) {
    if (other === name) part?.open();
    else part?.close?.();
  }
  document.title = `${tabs.find((tab) => tab.id === `tab-${name}`).textContent} · transformerlm`;
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
}

for (const [at, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    open(tabs[(to + tabs.length) % tabs.length].id.slice(4), { focus: true });
  });
}
const fromAddress = () => (location.hash.slice(1) in PARTS ? location.hash.slice(1) : "write");
addEventListener("hashchange", () => open(fromAddress()));

// What is served; asked again now and then, since a server that follows a run takes over new checkpoints.
let timer = 0;
async function look() {
  let wait = LOOK_MS;
  try {
    const cards = (await askJson("/v1/models")).data;
    settings.setModels(cards);
    const card = cards[0];
    const loss = card.val_loss == null ? "" : `, val loss ${card.val_loss.toFixed(3)}`;
    say("served", `${card.id} · step ${whole(card.step)}${loss}`);
  } catch (error) {
    wait = RETRY_MS;
    say("served", error.message, true);
  }
  clearTimeout(timer);
  timer = setTimeout(look, wait);
}

open(fromAddress());
if (fromAddress() === "write") write.focus();
look();
