// One chart of several curves, drawn by uPlot.

import { make } from "/static/dom.js";

// Okabe and Ito's colours, which people with any kind of colour vision tell apart.
export const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7f00", "#7a5ba6"];
const COLOURS_DARK = ["#56b4e9", "#ff8a4c", "#2fc79a", "#e8a0c8", "#f0b429", "#9bd0f5", "#f0e442", "#b79ae0"];
export const dark = matchMedia("(prefers-color-scheme: dark)");
const HEIGHT = 220;
const SYNC = "curves";
const KEY_STEPS = 40; // from one side of a chart to the other

export const colourOf = (number) => (dark.matches ? COLOURS_DARK : COLOURS)[number % COLOURS.length];

// Curves past the last colour have the first colours again, dashed.
export const isDashed = (number) => number >= COLOURS.length;
const dashOf = (number) => (isDashed(number) ? [7, 4] : undefined);

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function amount(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
}

const tick = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e9) return value.toExponential().replace("+", "");
  return size >= 10_000 ? new Intl.NumberFormat("en", { notation: "compact" }).format(value) : String(Number(value.toPrecision(6)));
};

export class Chart {
  // `onZoom` is told [from, to] when someone drags over the chart, and null after a double click.
  constructor(place, title, { onZoom = () => {} } = {}) {
    this.title = title;
    this.onZoom = onZoom;
    this.card = make("figure", { className: "card" }, make("h2", {}, title));
    this.body = make("div", { tabIndex: 0, role: "group", "aria-label": `${title}: ← and → move along it, Esc leaves` });
    this.body.addEventListener("keydown", (event) => this.moveBy(event));
    this.card.append(this.body);
    place.append(this.card);
    this.plot = null;
    this.marks = [];
    new ResizeObserver(() => this.resize()).observe(this.body);
    dark.addEventListener("change", () => this.forget());
  }

  // Show curves: [{name, colour, xs, ys, faint, points}], and marks: [{x, colour, isSmall}]. With `leastTop`, a linear scale begins
  // at 0 and goes up to that at least.
  draw(curves, { xLabel = "", logX = false, logY = false, marks = [], leastTop = null, xRange = null } = {}) {
    const shown = curves.filter((curve) => curve.ys.some((y) => y != null));
    this.card.hidden = !shown.length;
    if (!shown.length) return;
    this.marks = marks;
    this.card.setAttribute("aria-label", `${this.title}: ${shown.filter((curve) => !curve.faint).map(inWords).join(", ")}`);
    this.last = [curves, { xLabel, logX, logY, marks, leastTop, xRange }];
    const data = joined(shown, logX, logY);
    const kind = JSON.stringify([shown.map((curve) => [curve.name, curve.colour, curve.faint, isPoint(curve)]), xLabel, logX, logY, xRange, dark.matches]);
    if (this.plot && kind === this.kind) {
      this.plot.setData(data);
      return;
    }
    this.kind = kind;
    this.plot?.destroy();
    this.plot = new uPlot(this.options(shown, { xLabel, logX, logY, leastTop, xRange }), data, this.body);
  }

  options(curves, { xLabel, logX, logY, leastTop, xRange }) {
    const quiet = variable("--quiet");
    const axis = { stroke: quiet, grid: { stroke: variable("--line"), width: 1 }, ticks: { show: false }, font: `11px ${variable("--sans")}` };
    const values = (_, splits) => splits.map((value) => (value == null ? "" : tick(value)));
    return {
      width: Math.max(this.body.clientWidth, 200),
      height: HEIGHT,
      cursor: { sync: { key: SYNC, setSeries: false }, points: { size: 6 }, drag: { setScale: false }, bind: { dblclick: () => () => this.onZoom(null) } },
      legend: { live: true, markers: { dash: (plot, at) => (plot.series[at].dash ? "dashed" : "solid") } },
      scales: { x: { time: false, distr: logX ? 3 : 1, ...(xRange && { range: () => xRange }) }, y: { distr: logY ? 3 : 1, ...(leastTop !== null && !logY && { range: (_, low, high) => [0, Math.max(leastTop, 1.1 * high)] }) } },
      axes: [{ ...axis, values, label: xLabel, labelSize: 18, size: 26, labelFont: axis.font, labelGap: 0 }, { ...axis, values, size: 52 }],
      series: [
        { label: xLabel, value: (_, value) => amount(value) },
        ...curves.map((curve) => ({
          label: curve.name,
          class: curve.faint ? "faint" : undefined,
          stroke: curve.faint ? colourOf(curve.colour) + (curves.length > 6 ? "26" : "4d") : colourOf(curve.colour),
          width: curve.faint ? 1 : 1.75,
          dash: dashOf(curve.colour),
          points: { show: !!curve.points || isPoint(curve), size: 4 },
          value: (_, value) => amount(value),
        })),
      ],
      hooks: { draw: [(plot) => this.drawMarks(plot)], setSelect: [(plot) => this.zoomTo(plot)] },
    };
  }

  zoomTo(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.onZoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
  }

  // Move the cursor by keys, so that the legend shows the values there.
  moveBy(event) {
    if (!this.plot) return;
    const width = this.plot.bbox.width / devicePixelRatio;
    const at = this.plot.cursor.left >= 0 ? this.plot.cursor.left : width;
    const to = { ArrowLeft: at - width / KEY_STEPS, ArrowRight: at + width / KEY_STEPS, Home: 0, End: width, Escape: -10 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.plot.setCursor({ left: event.key === "Escape" ? to : Math.min(Math.max(to, 0), width), top: 10 });
  }

  drawMarks(plot) {
    const { ctx, bbox } = plot;
    for (const mark of this.marks) {
      const x = plot.valToPos(mark.x, "x", true);
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
      ctx.save();
      ctx.strokeStyle = colourOf(mark.colour);
      if (!mark.isSmall) ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, mark.isSmall ? bbox.top + bbox.height - 6 * devicePixelRatio : bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.restore();
    }
  }

  resize() {
    if (this.plot && this.body.clientWidth) this.plot.setSize({ width: this.body.clientWidth, height: HEIGHT });
  }

  forget() {
    this.plot?.destroy();
    this.plot = null;
    if (this.last && !this.card.hidden) this.draw(...this.last);
  }
}

// Return a curve's last value in words, for those who do not see it.
function inWords(curve) {
  const at = curve.ys.findLastIndex((y) => y != null);
  return `${curve.name} ${Number(curve.ys[at].toPrecision(4))} at ${amount(curve.xs[at])}`;
}

// Return whether a curve is one point, which no line would show.
const isPoint = (curve) => curve.ys.filter((y) => y != null).length < 2;

// Return uPlot's columns: all places on x in order, and each curve's value there; null, which makes a gap, where its own
// value is missing, and undefined, which makes none, where it has no point.
function joined(curves, logX, logY) {
  const tables = curves.map(({ xs, ys }) => {
    const kept = [[], []];
    for (let at = 0; at < xs.length; at++) {
      if (xs[at] == null || (logX && xs[at] <= 0) || (logY && ys[at] != null && ys[at] <= 0)) continue;
      kept[0].push(xs[at]);
      kept[1].push(ys[at]);
    }
    return kept;
  });
  return tables.length === 1 ? tables[0] : uPlot.join(tables);
}
