// Where memory went: the device's pages as a picture, host memory and disk as bars.

import { colorOf } from "./colors.js";
import { h, reconcile, setText } from "./dom.js";
import { bytes, count, nameOf, percent } from "./format.js";

/** Squares of the picture: with more pages than that, a square stands for several. */
const SQUARES_MAX = 480;
const LEGEND_MAX = 10;

/** Splits `squares` among parts by `pages`: nobody who has a page has no square. */
export function share(parts, squares) {
  const total = parts.reduce((sum, part) => sum + part.pages, 0);
  if (!total) return parts.map(() => 0);
  const exact = parts.map((part) => (part.pages * squares) / total);
  const given = parts.map((part, i) => (part.pages > 0 ? Math.max(1, Math.floor(exact[i])) : 0));
  let left = squares - given.reduce((sum, n) => sum + n, 0);
  const order = exact.map((value, i) => [value - given[i], i]).sort((a, b) => b[0] - a[0]).map(([, i]) => i);
  for (let at = 0; left > 0; at = (at + 1) % order.length, left -= 1) given[order[at]] += 1;
  while (left < 0) {
    const largest = given.indexOf(Math.max(...given));
    given[largest] -= 1;
    left += 1;
  }
  return given;
}

function partsOf(pages) {
  const parts = [{ key: "kv", label: "KV cache", color: "c-kv", pages: pages.kv }];
  for (const adapter of pages.adapters) {
    const label = nameOf(adapter);
    parts.push({ key: `adapter ${label} ${adapter.content}`, label, color: colorOf(label), pages: adapter.pages, adapter });
  }
  if (pages.other_pages > 0) {
    const label = pages.other_adapters ? `${count(pages.other_adapters)} more adapters` : "uploads and leaving adapters";
    parts.push({ key: "others", label, color: "c-other", pages: pages.other_pages });
  }
  parts.push({ key: "free", label: "Free", color: "c-free", pages: pages.free });
  return parts;
}

export function memoryPanel() {
  const grid = h("div", { class: "pages", role: "img" });
  const scale = h("p", { class: "panel-note" });
  const legend = h("ul", { class: "legend-list" });
  const bars = {
    device: bar("Device"), host: bar("Host memory"), disk: bar("Disk"),
  };
  const root = h("section", { class: "panel memory", "aria-labelledby": "memory-title" },
    h("header", { class: "panel-head" }, h("h2", { id: "memory-title", text: "Memory" }), scale),
    h("div", { class: "memory-parts" },
      h("div", {}, h("h3", { text: "Device pages" }), grid, legend),
      h("div", { class: "tiers" }, h("h3", { text: "Where adapters are" }), Object.values(bars).map((one) => one.root))));
  let drawn = "";

  return {
    root,
    render({ pages, tiers }) {
      const parts = partsOf(pages);
      const squares = Math.min(SQUARES_MAX, pages.total);
      const given = share(parts, squares);
      const picture = given.join(",") + parts.map((part) => part.color).join(",");
      if (picture !== drawn) {
        drawn = picture;
        grid.replaceChildren(...parts.flatMap((part, i) =>
          Array.from({ length: given[i] }, () => h("i", { class: part.color, title: part.label }))));
      }
      const each = pages.total > SQUARES_MAX ? ` · a square is about ${number1(pages.total / squares)} pages` : "";
      setText(scale, `${count(pages.total)} pages of ${bytes(pages.bytes)}${each}`);
      grid.setAttribute("aria-label", `Of ${pages.total} pages the KV cache has ${pages.kv}, adapters ${pages.adapter}, ${pages.free} are free`);
      const listed = parts.filter((part) => part.pages > 0);
      const shown = listed.length > LEGEND_MAX ? [...listed.slice(0, LEGEND_MAX - 2), rest(listed), listed.at(-1)] : listed;
      reconcile(legend, shown, (part) => part.key, legendItem, updateLegend);
      renderTiers(bars, pages, tiers);
    },
  };
}

const number1 = (value) => value.toFixed(1).replace(/\.0$/, "");

/** One line for what the legend has no room for. */
function rest(listed) {
  const cut = listed.slice(LEGEND_MAX - 2, -1);
  return { key: "rest", label: `${cut.length} more in colour`, color: "c-other", pages: cut.reduce((sum, part) => sum + part.pages, 0) };
}

function legendItem(part) {
  return h("li", {}, h("i", { class: `swatch ${part.color}` }), h("span", { class: "name", title: part.label }), h("span", { class: "marks" }), h("span", { class: "num" }));
}

function updateLegend(node, part) {
  const [, name, marks, pages] = node.children;
  setText(name, part.label);
  const running = part.adapter?.running ? `${count(part.adapter.running)} running` : "";
  setText(marks, [part.adapter?.pinned ? "pinned" : "", running].filter(Boolean).join(", "));
  setText(pages, count(part.pages));
}

function bar(label) {
  const name = h("span", { class: "tier-name", text: label });
  const fill = h("i", { class: "meter-fill" });
  const facts = h("p", { class: "tier-facts" });
  const value = h("span", { class: "num" });
  const meter = h("div", { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" }, fill);
  return { root: h("div", { class: "tier" }, h("div", { class: "tier-head" }, name, value), meter, facts), fill, facts, value, meter };
}

function renderBar(one, used, most, text, facts) {
  const share = most > 0 ? Math.min(1, used / most) : 0;
  one.fill.style.inlineSize = `${(100 * share).toFixed(1)}%`;
  one.meter.setAttribute("aria-valuenow", (100 * share).toFixed(0));
  one.meter.setAttribute("aria-valuetext", text);
  setText(one.value, text);
  setText(one.facts, facts);
}

const adaptersIn = (n) => (n === 1 ? "1 adapter" : `${count(n)} adapters`);

function renderTiers(bars, pages, tiers) {
  const pinned = (tier) => (tier.pinned ? `, ${count(tier.pinned)} pinned` : "");
  const used = pages.total - pages.free;
  renderBar(bars.device, used, pages.total, `${percent(used, pages.total)} of ${bytes(pages.total * pages.bytes)}`,
    `${adaptersIn(tiers.device.adapters)} in ${count(pages.adapter)} pages${pinned(tiers.device)}; ${count(tiers.device.in_use)} in use`);
  renderBar(bars.host, tiers.host_bytes, tiers.host_bytes_max, `${bytes(tiers.host_bytes)} of ${bytes(tiers.host_bytes_max)}`,
    `${adaptersIn(tiers.host.adapters)} only here${pinned(tiers.host)}`);
  const { store } = tiers;
  if (store) {
    renderBar(bars.disk, store.bytes + store.reserved_bytes, store.quota_bytes, `${bytes(store.bytes)} of ${bytes(store.quota_bytes)}`,
      `${adaptersIn(tiers.disk.adapters)} known only here; ${count(store.contents)} downloads kept`);
  } else {
    renderBar(bars.disk, 0, 0, "no store", `${adaptersIn(tiers.disk.adapters)} known only here`);
  }
}
