// A plot of the last five minutes, as SVG. The pointer or the arrow keys read its values at any second.

import { h, s, setText } from "./dom.js";

const SPAN_MS = 300_000;
const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 22;
const HEIGHT = 168;

/** The next of 1, 2, 5 times a power of ten. */
function niceCeil(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999999);
}

/**
 * `series`: [{label, value(point)}], at most two; the second is dashed. `format` writes a value, `tick` one of the axis, whose
 * top is at least `floor`.
 */
export function plot(title, series, { format, tick = format, floor }) {
  const drawing = s("svg", { "aria-hidden": "true", focusable: "false" });
  const readouts = series.map(() => h("span", { class: "reading", text: "–" }));
  const legend = series.map(({ label }, i) =>
    h("span", { class: "legend-item" }, h("i", { class: `line-key line-${i}` }), h("span", { text: label }), readouts[i]));
  const when = h("span", { class: "plot-when", text: "now" });
  const area = h("div", {
    class: "plot-area", tabIndex: 0, role: "slider", "aria-label": `${title}: moment to read`, "aria-orientation": "horizontal",
    "aria-valuemin": "-300", "aria-valuemax": "0", "aria-valuenow": "0", "aria-valuetext": "no values yet",
  }, drawing);
  const empty = h("p", { class: "plot-empty", text: "No values yet" });
  area.append(empty);
  const root = h("figure", { class: "panel plot" },
    h("figcaption", {}, h("h2", { text: title }), when), h("div", { class: "legend" }, legend), area);

  let points = [];
  let now = 0;
  let picked = null;
  let width = 0;
  let top = floor;

  const x = (time) => LEFT + (width - LEFT - RIGHT) * (1 - (now - time) / SPAN_MS);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);

  function axes() {
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = y(top * share);
      parts.push(s("line", { class: share === 0 ? "axis" : "gridline", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
      const label = s("text", { class: "tick", x: LEFT - 8, y: at + 4, "text-anchor": "end" });
      label.textContent = tick(top * share);
      parts.push(label);
    }
    for (let minute = 0; minute <= 5; minute += width < 420 ? 2 : 1) {
      const label = s("text", {
        class: "tick", x: x(now - minute * 60_000), y: HEIGHT - 5, "text-anchor": minute === 0 ? "end" : "middle",
      });
      label.textContent = minute === 0 ? "now" : `−${minute} min`;
      parts.push(label);
    }
    return parts;
  }

  function path(value) {
    let d = "";
    let broken = true;
    let previous = 0;
    for (const point of points) {
      const v = value(point);
      if (v === null || v === undefined || now - point.time_ms > SPAN_MS) {
        broken = true;
        continue;
      }
      if (point.time_ms - previous > 5000) broken = true;
      d += `${broken ? "M" : "L"}${x(point.time_ms).toFixed(1)} ${y(Math.min(v, top)).toFixed(1)}`;
      broken = false;
      previous = point.time_ms;
    }
    return d;
  }

  function draw() {
    if (!width) return;
    drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const lines = series.map(({ value }, i) => s("path", { class: `line line-${i}`, d: path(value) }));
    drawing.replaceChildren(...axes(), ...lines.reverse(), ...cursor());
  }

  function cursor() {
    const point = picked === null ? points.at(-1) : points[picked];
    series.forEach(({ value }, i) => {
      const v = point ? value(point) : null;
      setText(readouts[i], v === null || v === undefined ? "–" : format(v));
    });
    const age = point ? Math.max(0, Math.round((now - point.time_ms) / 1000)) : 0;
    setText(when, picked === null || !point ? "now" : age === 0 ? "now" : `${age} s ago`);
    if (picked === null || !point) return [];
    const at = x(point.time_ms);
    const dots = series.map(({ value }, i) => [value(point), i]).filter(([v]) => v !== null && v !== undefined);
    return [
      s("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM }),
      ...dots.map(([v, i]) => s("circle", { class: `dot line-${i}`, cx: at, cy: y(Math.min(v, top)), r: 4 })),
    ];
  }

  function speak() {
    const point = picked === null ? points.at(-1) : points[picked];
    if (!point) return;
    const age = Math.max(0, Math.round((now - point.time_ms) / 1000));
    const said = series.map(({ label, value }) => {
      const v = value(point);
      return `${label} ${v === null || v === undefined ? "no value" : format(v)}`;
    });
    area.setAttribute("aria-valuenow", String(-age));
    area.setAttribute("aria-valuetext", `${age === 0 ? "now" : `${age} seconds ago`}: ${said.join(", ")}`);
  }

  function pick(index) {
    picked = index === null || !points.length ? null : Math.max(0, Math.min(points.length - 1, index));
    draw();
    speak();
  }

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const time = now - SPAN_MS * (1 - (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT));
    let best = null;
    points.forEach((point, i) => {
      if (best === null || Math.abs(point.time_ms - time) < Math.abs(points[best].time_ms - time)) best = i;
    });
    pick(best);
  });
  area.addEventListener("pointerleave", () => pick(null));
  area.addEventListener("blur", () => pick(null));
  area.addEventListener("focus", speak);
  area.addEventListener("keydown", (event) => {
    const at = picked ?? points.length - 1;
    const moves = {
      ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
      PageUp: at - 30, PageDown: at + 30, Home: 0, End: points.length - 1, Escape: null,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    pick(moves[event.key]);
  });
  new ResizeObserver(([entry]) => {
    width = Math.round(entry.contentRect.width);
    draw();
  }).observe(area);

  return {
    root,
    /** Shows these points; the last one is now. */
    render(all) {
      const last = points[picked ?? -1];
      points = all;
      now = all.length ? all.at(-1).time_ms : 0;
      if (picked !== null) {
        // The same moment, one second further back.
        picked = last ? all.findIndex((point) => point.seq === last.seq) : -1;
        if (picked < 0) picked = null;
      }
      let most = 0;
      for (const point of all) for (const { value } of series) most = Math.max(most, value(point) ?? 0);
      top = most > floor ? niceCeil(most) : floor;
      empty.hidden = series.some(({ value }) => all.some((point) => (value(point) ?? null) !== null));
      if (document.activeElement === area || picked === null) speak();
      draw();
    },
  };
}
