// The page: its tabs, and what all of them show of the server.

import { askJson } from "/static/api.js";
import * as chat from "/static/chat.js";
import { byId, say, whole } from "/static/dom.js";
import * as runs from "/static/runs.js";
import * as server from "/static/server.js";
import * as settings from "/static/settings.js";
import * as tokens from "/static/tokens_tab.js";
import * as write from "/static/write.js";

const PARTS = { write: null, chat: null, tokens, runs, server };
const ADDRESS = "#/"; // with an element's id alone, the browser would go there and take the focus away
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
  if (location.hash !== ADDRESS + name) history.replaceState(null, "", ADDRESS + name);
}

for (const tab of tabs) {
  tab.addEventListener("click", () => open(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const shown = tabs.filter((one) => !one.hidden);
    const at = shown.indexOf(tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    open(shown[(to + shown.length) % shown.length].id.slice(4), { focus: true });
  });
}
const named = () => location.hash.slice(ADDRESS.length);
const fromAddress = () => (Object.hasOwn(PARTS, named()) && !byId(`tab-${named()}`).hidden ? named() : "write");
addEventListener("hashchange", () => open(fromAddress()));

// What is served; asked again now and then, since a server that follows a run takes over new checkpoints.
let timer = 0;
let chatIsKnown = false;
const first = named();
async function look() {
  let wait = LOOK_MS;
  try {
    const cards = (await askJson("/v1/models")).data;
    settings.setModels(cards);
    const card = cards[0];
    const loss = card.val_loss == null ? "" : `, val loss ${card.val_loss.toFixed(3)}`;
    say("served", `${card.id} · step ${whole(card.step)}${loss}`);
    if (!chatIsKnown) {
      byId("tab-chat").hidden = !(await chat.isOffered());
      chatIsKnown = true;
      if (first === "chat" && fromAddress() === "write" && !byId("tab-chat").hidden) open("chat");
    }
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
