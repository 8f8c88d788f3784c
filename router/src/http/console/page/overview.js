// The first view: what the server does this second.

import { colorOf } from "./colors.js";
import { gate } from "./dialogs.js";
import { choice, h, reconcile, setText } from "./dom.js";
import { axisTime, bytes, count, duration, number, percent, shareName, time, timeParts } from "./format.js";
import { memoryPanel } from "./memory.js";
import { plot } from "./plot.js";

const ROWS_MAX = 8;

function tile(label, hint) {
  const value = h("span", { class: "tile-value", text: "–" });
  const unit = h("span", { class: "tile-unit" });
  const note = h("p", { class: "tile-note" });
  const root = h("div", { class: "tile", title: hint }, h("h2", { text: label }), h("p", { class: "tile-line" }, value, unit), note);
  return {
    root,
    set(text, unitText, noteText) {
      setText(value, text);
      setText(unit, unitText);
      setText(note, noteText);
    },
  };
}

function tiles() {
  const all = {
    running: tile("Running", "Sequences that hold device memory"),
    generated: tile("Generated", "Tokens a second, mean of three seconds"),
    prompt: tile("Prompt", "Prompt tokens a second, mean of three seconds"),
    first: tile("First token", "From submission to the first token, median of the last minute"),
    inter: tile("Between tokens", "Between two tokens of a sequence, median of the last minute"),
    kv: tile("KV cache", "KV blocks that running sequences hold"),
  };
  const root = h("div", { class: "tiles" }, Object.values(all).map((one) => one.root));
  return {
    root,
    render({ batch, rates, minute, pages, totals }) {
      all.running.set(count(batch.running), batch.running === 1 ? "sequence" : "sequences", `${count(batch.waiting)} waiting`);
      all.generated.set(number(rates.generation_tokens_per_s), "tok/s", `${count(totals.generation_tokens)} since the start`);
      all.prompt.set(number(rates.prompt_tokens_per_s), "tok/s", `${count(totals.prompt_tokens)} since the start`);
      for (const [one, times] of [[all.first, minute.first_token], [all.inter, minute.inter_token]]) {
        const [value, unit] = timeParts(times.p50);
        one.set(value, unit, times.count ? `p99 ${time(times.p99)}, last minute` : "none in the last minute");
      }
      const kept = pages.blocks_cached ? `, ${count(pages.blocks_cached)} kept for prefixes` : "";
      const [value] = percent(pages.blocks_used, pages.blocks_total).split(" ");
      all.kv.set(value, "%", `${count(pages.blocks_used)} of ${count(pages.blocks_total)} blocks${kept}`);
    },
  };
}

function batchPanel() {
  let unit = "running";
  let last = null;
  const bar = h("div", { class: "stack", role: "img", "aria-label": "Nothing runs" });
  const body = h("tbody");
  const note = h("p", { class: "panel-note" });
  const table = h("table", { class: "plain" },
    h("caption", { class: "unseen", text: "Sequences and tokens by adapter" }),
    h("thead", {}, h("tr", {}, ["Adapter", "Running", "Waiting", "Tokens"].map((text, i) =>
      h("th", { scope: "col", class: i ? "num" : "", text })))), body);
  const empty = h("p", { class: "empty" }, "Nothing runs. Send a request, or ",
    h("a", { href: "#playground", text: "try the playground" }), ".");
  const toggle = choice("Measure of the bar", [["running", "Sequences"], ["running_tokens", "Tokens"]], unit, (value) => {
    unit = value;
    if (last) render(last);
  });
  const root = h("section", { class: "panel batch", "aria-labelledby": "batch-title" },
    h("header", { class: "panel-head" }, h("h2", { id: "batch-title", text: "Batch by adapter" }), note, toggle), bar, table, empty);

  function render(live) {
    last = live;
    const { shares, others } = live.batch;
    const rows = shares.map((share) => ({ ...share, name: shareName(share.adapters) }));
    const listed = rows.slice(0, ROWS_MAX);
    const cut = [...rows.slice(ROWS_MAX), ...(others.shares ? [others] : [])];
    if (cut.length) {
      const sum = (of) => cut.reduce((total, row) => total + row[of], 0);
      const more = rows.length - listed.length + others.shares;
      listed.push({
        name: `${count(more)} more`, isRest: true, running: sum("running"), waiting: sum("waiting"), running_tokens: sum("running_tokens"),
      });
    }
    const color = (row) => (row.isRest ? "c-other" : colorOf(row.name));
    const parts = listed.filter((row) => row[unit] > 0);
    reconcile(bar, parts, (row) => row.name, (row) => h("i", { class: color(row) }), (node, row) => {
      node.style.flexGrow = row[unit];
      node.title = `${row.name}: ${count(row[unit])} ${unit === "running" ? "sequences" : "tokens"}`;
    });
    bar.setAttribute("aria-label", parts.map((row) => `${row.name} ${count(row[unit])}`).join(", ") || "Nothing runs");
    bar.classList.toggle("is-empty", !parts.length);
    reconcile(body, listed, (row) => row.name, (row) => batchRow(row, color(row)), updateBatchRow);
    empty.hidden = listed.length > 0;
    table.hidden = !listed.length;
    const total = rows.length + others.shares;
    setText(note, total ? `${count(total)} in this batch` : "");
  }
  return { root, render };
}

function batchRow(row, color) {
  const name = h("th", { scope: "row" }, h("span", { class: "named" }, h("i", { class: `swatch ${color}` }), h("span", { class: "name", text: row.name, title: row.name })));
  return h("tr", {}, name, h("td", { class: "num" }), h("td", { class: "num" }), h("td", { class: "num" }));
}

function updateBatchRow(node, row) {
  const [, running, waiting, tokens] = node.children;
  setText(running, count(row.running));
  setText(waiting, count(row.waiting));
  setText(tokens, count(row.running_tokens));
}

function queuePanel() {
  const waiting = h("span", { class: "tile-value", text: "0" });
  const what = h("span", { class: "tile-unit" });
  const list = h("ul", { class: "legend-list" });
  const loading = h("p", { class: "panel-note wide" });
  const root = h("section", { class: "panel queue", "aria-labelledby": "queue-title" },
    h("header", { class: "panel-head" }, h("h2", { id: "queue-title", text: "Queue" })), h("p", { class: "tile-line" }, waiting, what), list, loading);
  return {
    root,
    render({ batch }) {
      setText(waiting, count(batch.waiting));
      setText(what, batch.waiting === 1 ? "sequence waits" : "sequences wait");
      const rows = batch.shares.filter((share) => share.waiting > 0)
        .map((share) => ({ name: shareName(share.adapters), waiting: share.waiting }))
        .sort((a, b) => b.waiting - a.waiting).slice(0, ROWS_MAX);
      reconcile(list, rows, (row) => row.name,
        (row) => h("li", {}, h("i", { class: `swatch ${colorOf(row.name)}` }), h("span", { class: "name", text: row.name, title: row.name }), h("span"), h("span", { class: "num" })),
        (node, row) => setText(node.lastElementChild, count(row.waiting)));
      const names = batch.loading_names.slice(0, 4).map((named) => shareName([named])).join(", ");
      const more = batch.loading > 4 ? ` and ${count(batch.loading - 4)} more` : "";
      setText(loading, batch.loading ? `On their way to the device: ${names}${more}` : "No adapter is awaited on the device.");
    },
  };
}

function factsPanel() {
  const names = ["Steps", "Prefix cache hits", "Preemptions", "Adapter uploads", "Adapter evictions", "Shard restarts", "Model", "Device", "Up for", "Version"];
  const values = Object.fromEntries(names.map((name) => [name, h("dd")]));
  const root = h("section", { class: "panel facts", "aria-labelledby": "facts-title" },
    h("h2", { id: "facts-title", class: "unseen", text: "Since the start" }),
    h("dl", {}, names.map((name) => h("div", {}, h("dt", { text: name }), values[name]))));
  return {
    root,
    render({ totals, rates, version, uptime_s, build }) {
      const replayed = totals.replayed_requests ? `, ${count(totals.replayed_requests)} requests went on` : "";
      const said = {
        "Steps": `${number(rates.steps_per_s)} /s`,
        "Prefix cache hits": percent(totals.prefix_hits, totals.prefix_queries),
        "Preemptions": count(totals.preemptions),
        "Adapter uploads": count(totals.adapter_uploads),
        "Adapter evictions": count(totals.adapter_evictions),
        "Shard restarts": `${count(totals.shard_restarts)}${replayed}`,
        "Model": `${build.architecture || "–"}, ${bytes(build.weight_bytes)}`,
        "Device": [build.device, build.dtype].filter(Boolean).join(", ") || "–",
        "Up for": duration(uptime_s),
        "Version": version,
      };
      for (const [name, text] of Object.entries(said)) setText(values[name], text);
    },
  };
}

export function overviewView(root) {
  const notice = h("p", { class: "notice", role: "alert", hidden: true });
  const locked = gate();
  const inTokens = { format: number, floor: 10 };
  const inTime = (floor) => ({ format: time, tick: axisTime, floor });
  const plots = [
    plot("Throughput", [
      { label: "generated tok/s", value: (point) => point.generation_tokens_per_s },
      { label: "prompt tok/s", value: (point) => point.prompt_tokens_per_s }], inTokens),
    plot("Sequences", [
      { label: "running", value: (point) => point.running }, { label: "waiting", value: (point) => point.waiting }], { format: number, floor: 4 }),
    plot("Time to first token", [
      { label: "p50", value: (point) => point.first_token?.[0] }, { label: "p99", value: (point) => point.first_token?.[1] }], inTime(0.01)),
    plot("Time between tokens", [
      { label: "p50", value: (point) => point.inter_token?.[0] }, { label: "p99", value: (point) => point.inter_token?.[1] }], inTime(0.001)),
  ];
  const panels = [tiles(), batchPanel(), queuePanel(), memoryPanel(), factsPanel()];
  const [top, batch, queue, memory, facts] = panels.map((panel) => panel.root);
  const board = h("div", { class: "board" }, top, batch, h("div", { class: "side" }, queue, facts), memory,
    h("div", { class: "plots" }, plots.map((one) => one.root)));
  root.append(notice, locked.root, board);

  return {
    render(state) {
      const { phase, live } = state;
      locked.render(state);
      board.hidden = phase === "locked" || phase === "absent";
      board.classList.toggle("is-loading", !live);
      board.classList.toggle("is-stale", phase === "offline");
      board.setAttribute("aria-busy", String(phase === "loading"));
      notice.hidden = !(phase === "offline" || (live && !live.ready));
      if (phase === "offline") setText(notice, `Disconnected: ${state.refusal?.message ?? "no answer"}. The numbers are the last ones; trying again.`);
      else if (live?.draining) setText(notice, "The server is shutting down: running requests finish, new ones are refused.");
      else if (live && !live.ready) setText(notice, live.waiting_for.length ? `Not ready: waiting for ${live.waiting_for.join(", ")}.` : "The model is still loading.");
      if (!live || phase === "offline") return;
      for (const panel of panels) panel.render(live);
      for (const one of plots) one.render(state.points);
    },
  };
}
