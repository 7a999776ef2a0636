// Small helpers. Text goes into the page by textContent only: a sample, a run's name or a prompt may be HTML.

export const byId = (id) => document.getElementById(id);

// Return an element with properties and children; strings become text.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "scope" || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Fill a <dl> with pairs of words and numbers; what is unchanged stays in place.
export function showNumbers(list, pairs) {
  pairs.forEach(([words, value], at) => {
    let row = list.children[at];
    if (!row) list.append((row = make("div", {}, make("dt"), make("dd"))));
    if (row.firstChild.textContent !== words) row.firstChild.textContent = words;
    if (row.lastChild.textContent !== value) row.lastChild.textContent = value;
  });
  while (list.children.length > pairs.length) list.lastChild.remove();
}

// Replace an element's children from the first that differs on, so that a selection or a reader's place in it stays.
export function replace(place, ...children) {
  let same = 0;
  while (same < children.length && place.childNodes[same]?.isEqualNode(children[same])) same++;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...children.slice(same));
}

// Words that are there already are not said again: a screen reader would read them.
export function say(id, words, isBad = false) {
  const place = byId(id);
  if (place.textContent !== words) place.textContent = words;
  place.classList.toggle("bad", isBad);
}

const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const short = (number) => (number == null ? "–" : SHORT.format(number));
export const whole = (number) => (number == null ? "–" : WHOLE.format(number));
export const fixed = (number, digits = 3) => (number == null ? "–" : number.toFixed(digits));
export const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");

// Keep options of a <select> as they are wanted, and what is chosen.
export function setOptions(select, values, label = (value) => value) {
  const before = select.value;
  const now = [...select.options];
  if (now.length === values.length && now.every((option, at) => option.value === values[at])) {
    now.forEach((option, at) => {
      const words = label(values[at]);
      if (option.textContent !== words) option.textContent = words;
    });
    return;
  }
  select.replaceChildren(...values.map((value) => make("option", { value }, label(value))));
  if (values.includes(before)) select.value = before;
}
