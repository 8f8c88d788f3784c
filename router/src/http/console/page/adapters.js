// The table of adapters: one page at a time, as the server sorts and finds them.

import { Refused, call } from "./api.js";
import { askLoad, askPin, askUnload, askUnpin, gate } from "./dialogs.js";
import { colorOf } from "./colors.js";
import { field, h, reconcile, setText } from "./dom.js";
import { ago, bytes, count, nameOf } from "./format.js";

const PAGE = 25;
const EVERY_MS = 2500;
const STATES = ["registered", "resolving", "fetching", "verifying", "preparing", "ready", "draining", "failed"];
/** Label, what the server calls it, whether the largest come first. */
const COLUMNS = [
  ["Name", "name", false], ["State", "state", false], ["Where", "residency", true], ["Rank", "rank", true], ["Size", "bytes", true],
  ["Sequences", "sequences", true], ["Last used", "last_used", true],
];
const KINDS = { ready: "good", failed: "bad", draining: "warn", registered: "idle" };

export function adaptersView(root) {
  const ask = { sort: "name", descending: false, contains: "", state: "", offset: 0 };
  let total = 0;
  let timer = 0;
  let asking = null;
  let phase = "loading";

  const locked = gate();
  const notice = h("p", { class: "notice", role: "alert", hidden: true });
  const search = h("input", { type: "search", placeholder: "Part of a name", autocomplete: "off", spellcheck: false });
  const state = h("select", {}, h("option", { value: "", text: "All states" }), STATES.map((value) => h("option", { value, text: value })));
  const load = h("button", { type: "button", class: "primary", text: "Load adapter", on: { click: () => act(askLoad()) } });
  const heads = COLUMNS.map(([label, name, descending]) => {
    const button = h("button", { type: "button", class: "sort", on: { click: () => sortBy(name, descending) } }, label);
    return h("th", { scope: "col", role: "columnheader", data: { name } }, button);
  });
  const body = h("tbody", { role: "rowgroup" });
  const table = h("table", { class: "adapters", role: "table", "aria-label": "Adapters" },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads, h("th", { scope: "col", role: "columnheader" }, h("span", { class: "unseen", text: "Actions" })))), body);
  const empty = h("p", { class: "empty", hidden: true });
  const where = h("p", { class: "page-where", role: "status" });
  const back = h("button", { type: "button", class: "quiet", text: "Previous", on: { click: () => turn(-PAGE) } });
  const on = h("button", { type: "button", class: "quiet", text: "Next", on: { click: () => turn(PAGE) } });
  const panel = h("div", { class: "panel table-panel" },
    h("div", { class: "toolbar" }, field("Search", search), field("State", state), load), table, empty,
    h("div", { class: "pager" }, where, back, on));
  root.append(notice, locked.root, panel);

  let typing = 0;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ contains: search.value.trim() }), 200);
  });
  state.addEventListener("change", () => change({ state: state.value }));

  function change(changed) {
    Object.assign(ask, changed, { offset: 0 });
    refresh();
  }

  function sortBy(name, descending) {
    const again = ask.sort === name;
    change({ sort: name, descending: again ? !ask.descending : descending });
  }

  function turn(by) {
    ask.offset = Math.max(0, ask.offset + by);
    refresh();
  }

  async function act(asked) {
    if (await asked) refresh();
  }

  async function refresh() {
    clearTimeout(timer);
    if (root.hidden || phase === "locked" || phase === "absent") return;
    asking?.abort();
    const own = (asking = new AbortController());
    const query = new URLSearchParams({ sort: `${ask.descending ? "-" : ""}${ask.sort}`, contains: ask.contains, offset: ask.offset, limit: PAGE });
    if (ask.state) query.set("state", ask.state);
    try {
      const page = await call("admin", "GET", `admin/v1/adapters?${query}`, { signal: own.signal });
      total = page.total;
      if (ask.offset >= total && ask.offset > 0) {
        ask.offset = Math.max(0, Math.floor((total - 1) / PAGE) * PAGE);
        return void refresh();
      }
      notice.hidden = true;
      show(page.data);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Refused)) throw error;
      // The loop of live numbers says where the key is wrong.
      notice.hidden = error.status === 401 || error.status === 403 || error.status === 404;
      setText(notice, `The list could not be read: ${error.text}.`);
    }
    clearTimeout(timer);
    timer = setTimeout(() => (document.hidden ? (timer = setTimeout(refresh, EVERY_MS)) : refresh()), EVERY_MS);
  }

  function show(data) {
    for (const head of heads) {
      const is = head.dataset.name === ask.sort;
      if (is) head.setAttribute("aria-sort", ask.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    const now = Date.now();
    reconcile(body, data, (view) => `${view.namespace ?? ""}\n${view.name}`, () => row(act), (node, view) => node.update(view, now));
    table.hidden = !data.length;
    empty.hidden = data.length > 0;
    const filtered = ask.contains || ask.state;
    setText(empty, filtered ? "No adapter fits." : "No adapter is registered. Load one by name and reference, or let a request name one.");
    setText(where, data.length ? `${count(ask.offset + 1)}–${count(ask.offset + data.length)} of ${count(total)}` : "");
    back.disabled = ask.offset === 0;
    on.disabled = ask.offset + data.length >= total;
    back.hidden = on.hidden = total <= PAGE;
  }

  return {
    shown: refresh,
    render(live) {
      const before = phase;
      phase = live.phase;
      locked.render(live);
      panel.hidden = phase === "locked" || phase === "absent";
      if (before !== phase && phase === "live") refresh();
    },
  };
}

/** A row whose `update` fills it in. */
function row(act) {
  const dot = h("i", { class: "swatch" });
  const name = h("span", { class: "name" });
  const ref = h("span", { class: "ref" });
  const error = h("span", { class: "row-error" });
  const badge = h("span", { class: "badge" });
  const progress = h("span", { class: "ref" });
  const cells = ["State", "Where", "Rank", "Size", "Sequences", "Last used"].map((label, i) =>
    h("td", { role: "cell", data: { label }, class: i > 1 ? "num" : "" }));
  const [state, where, rank, size, sequences, used] = cells;
  state.append(badge, progress);
  const pin = h("button", { type: "button", class: "small" });
  const unload = h("button", { type: "button", class: "small", text: "Unload" });
  const head = h("th", { scope: "row", role: "rowheader" },
    h("span", { class: "named" }, dot, h("span", { class: "name-lines" }, name, ref, error)));
  const node = h("tr", { role: "row" }, head, cells, h("td", { role: "cell", class: "actions" }, h("span", {}, pin, unload)));
  let current = null;
  pin.addEventListener("click", () => act(current.pinned ? askUnpin(current) : askPin(current)));
  unload.addEventListener("click", () => act(askUnload(current)));

  node.update = (view, now) => {
    current = view;
    const label = nameOf({ name: view.name, namespace: view.namespace });
    dot.className = `swatch ${colorOf(label)}`;
    setText(name, label);
    name.title = label;
    // An error beside content that is still to come is that content's.
    const shownRef = view.error && view.next?.ref ? view.next.ref : view.ref;
    setText(ref, shownRef);
    ref.title = view.revision && shownRef === view.ref ? `${view.ref} at ${view.revision}` : shownRef;
    setText(error, view.error ? `${view.error.message} (${view.error.code})` : "");
    badge.dataset.kind = KINDS[view.state] ?? "busy";
    setText(badge, view.state);
    const next = view.next;
    setText(progress, next ? `${next.state}${next.bytes_total ? ` ${bytes(next.bytes_done)} of ${bytes(next.bytes_total)}` : ""}` : "");
    setText(where, view.residency ? `${view.residency}${view.pinned ? `, pinned${view.pin ? ` (${view.pin})` : ""}` : ""}` : "–");
    setText(rank, view.rank_max ? (view.rank_min === view.rank_max ? view.rank_max : `${view.rank_min}–${view.rank_max}`) : "–");
    setText(size, view.bytes ? bytes(view.bytes) : "–");
    setText(sequences, view.waiting ? `${count(view.running)} + ${count(view.waiting)} waiting` : count(view.running));
    setText(used, ago(view.last_used, now));
    setText(pin, view.pinned ? "Unpin" : "Pin");
    pin.setAttribute("aria-label", `${view.pinned ? "Unpin" : "Pin"} ${label}`);
    pin.disabled = view.state !== "ready";
    unload.setAttribute("aria-label", `Unload ${label}`);
  };
  return node;
}
