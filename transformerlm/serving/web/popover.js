// The ten alternatives to a token, beside it: by mouse while it is over the token, by keyboard until Escape.

import { byId, make, percent } from "/static/dom.js";
import { bytesOf, readable } from "/static/pieces.js";

const box = byId("popover");
let closing = 0;
let back = null;

// Show the alternatives to a piece beside `span`; `choose` gets the one that is clicked. With `focusBack` the keyboard
// goes into the list, and to `focusBack` when it closes.
export function open(span, piece, choose, focusBack = null) {
  clearTimeout(closing);
  const p = Math.exp(piece.logprob);
  const rank = piece.top.findIndex((one) => one.id === piece.id) + 1;
  const place = rank && rank <= 10 ? `, number ${rank}` : "";
  const heading = make("p", {}, `${percent(p)} · id ${piece.id}${place}`);
  const buttons = piece.top.slice(0, 10).map((one) => {
    const button = make("button", { type: "button" }, make("span", { className: "piece" }, readable(bytesOf(one.spelled))),
      make("span", {}, percent(Math.exp(one.logprob))), make("progress", { max: 1, value: Math.exp(one.logprob), "aria-hidden": "true" }));
    button.classList.toggle("drawn", one.id === piece.id);
    button.dataset.id = one.id;
    button.addEventListener("click", () => (close(), choose(one)));
    return button;
  });
  box.replaceChildren(heading, ...buttons);
  box.hidden = false;
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8));
  box.style.left = `${left + scrollX}px`;
  box.style.top = `${at.bottom + scrollY + 4}px`;
  back = focusBack;
  if (focusBack) (box.querySelector(".drawn") ?? buttons[0])?.focus();
}

export function close() {
  clearTimeout(closing);
  if (box.hidden) return;
  box.hidden = true;
  back?.focus();
  back = null;
}

export const closeSoon = () => {
  clearTimeout(closing);
  if (!back) closing = setTimeout(close, 250);
};

box.addEventListener("mouseenter", () => clearTimeout(closing));
box.addEventListener("mouseleave", closeSoon);
box.addEventListener("focusout", (event) => {
  if (back && !box.contains(event.relatedTarget)) {
    back = null;
    close();
  }
});
box.addEventListener("keydown", (event) => {
  const buttons = [...box.querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (to === undefined) return;
  buttons[(to + buttons.length) % buttons.length]?.focus();
  event.preventDefault();
  event.stopPropagation();
});
// Wherever the keyboard is: what the mouse has opened has no focus.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || box.hidden) return;
  close();
  event.preventDefault();
});
