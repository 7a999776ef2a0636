// One chart of several curves, drawn by uPlot.

import { make } from "/static/dom.js";

// Okabe and Ito's colours, which people with any kind of colour vision tell apart.
export const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7f00", "#7a5ba6"];
const COLOURS_DARK = ["#56b4e9", "#ff8a4c", "#2fc79a", "#e8a0c8", "#f0b429", "#9bd0f5", "#f0e442", "#b79ae0"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const HEIGHT = 220;
const SYNC = "curves";

export const colourOf = (number) => (dark.matches ? COLOURS_DARK : COLOURS)[number % COLOURS.length];

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
  constructor(place, title) {
    this.title = title;
    this.card = make("figure", { className: "card" }, make("h2", {}, title));
    this.body = make("div");
    this.card.append(this.body);
    place.append(this.card);
    this.plot = null;
    this.marks = [];
    new ResizeObserver(() => this.resize()).observe(this.body);
    dark.addEventListener("change", () => this.forget());
  }

  // Show curves: [{name, colour, xs, ys, faint}], and marks: [{x, colour}].
  draw(curves, { xLabel = "", logX = false, logY = false, marks = [], from0 = false } = {}) {
    const shown = curves.filter((curve) => curve.ys.some((y) => y != null));
    this.card.hidden = !shown.length;
    if (!shown.length) return;
    this.marks = marks;
    this.card.setAttribute("aria-label", `${this.title}: ${shown.filter((curve) => !curve.faint).map(inWords).join(", ")}`);
    this.last = [curves, { xLabel, logX, logY, marks, from0 }];
    const data = joined(shown, logX, logY);
    const kind = JSON.stringify([shown.map((curve) => [curve.name, curve.colour, curve.faint, isPoint(curve)]), xLabel, logX, logY, dark.matches]);
    if (this.plot && kind === this.kind) {
      this.plot.setData(data);
      return;
    }
    this.kind = kind;
    this.plot?.destroy();
    this.plot = new uPlot(this.options(shown, { xLabel, logX, logY, from0 }), data, this.body);
  }

  options(curves, { xLabel, logX, logY, from0 }) {
    const quiet = variable("--quiet");
    const axis = { stroke: quiet, grid: { stroke: variable("--line"), width: 1 }, ticks: { show: false }, font: `11px ${variable("--sans")}` };
    const values = (_, splits) => splits.map((value) => (value == null ? "" : tick(value)));
    return {
      width: Math.max(this.body.clientWidth, 200),
      height: HEIGHT,
      cursor: { sync: { key: SYNC, setSeries: false }, points: { size: 6 } },
      legend: { live: true },
      scales: { x: { time: false, distr: logX ? 3 : 1 }, y: { distr: logY ? 3 : 1, ...(from0 && { range: (_, low, high) => [0, Math.max(1, 1.1 * high)] }) } },
      axes: [{ ...axis, values, label: xLabel, labelSize: 18, size: 26, labelFont: axis.font, labelGap: 0 }, { ...axis, values, size: 52 }],
      series: [
        { label: xLabel, value: (_, value) => amount(value) },
        ...curves.map((curve) => ({
          label: curve.name,
          stroke: curve.faint ? `${colourOf(curve.colour)}44` : colourOf(curve.colour),
          width: curve.faint ? 1 : 1.75,
          spanGaps: true,
          points: { show: !!curve.points || isPoint(curve), size: 4 },
          value: (_, value) => amount(value),
        })),
      ],
      hooks: { draw: [(plot) => this.drawMarks(plot)] },
    };
  }

  drawMarks(plot) {
    const { ctx, bbox } = plot;
    for (const mark of this.marks) {
      const x = plot.valToPos(mark.x, "x", true);
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
      ctx.save();
      ctx.strokeStyle = colourOf(mark.colour);
      ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
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

// Return uPlot's columns: all places on x in order, and each curve's value there.
function joined(curves, logX, logY) {
  const tables = curves.map(({ xs, ys }) => {
    const kept = [[], []];
    for (let at = 0; at < xs.length; at++) {
      if (xs[at] == null || ys[at] == null || (logX && xs[at] <= 0) || (logY && ys[at] <= 0)) continue;
      kept[0].push(xs[at]);
      kept[1].push(ys[at]);
    }
    return kept;
  });
  return tables.length === 1 ? tables[0] : uPlot.join(tables);
}
