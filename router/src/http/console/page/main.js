// Which view is shown, and the one loop that asks for live numbers.

import { Refused, call, key } from "./api.js";
import { adaptersView } from "./adapters.js";
import { askKeys } from "./dialogs.js";
import { byId, setText } from "./dom.js";
import { overviewView } from "./overview.js";
import { playgroundView } from "./playground.js";

const EVERY_MS = 1000;
const PAUSE_MAX_MS = 10000;
const POINTS_MAX = 300;
const VIEWS = ["overview", "adapters", "playground"];

// Not the names of the hashes: the browser would scroll to them.
const section = (name) => byId(`view-${name}`);
const views = {
  overview: overviewView(section("overview")),
  adapters: adaptersView(section("adapters")),
  playground: playgroundView(section("playground")),
};

/** What every view is told: `phase` is loading, live, offline, locked or absent. */
const state = { phase: "loading", live: null, points: [], refusal: null };
let started = null;
let next = 0;
let failures = 0;
let timer = 0;
let asking = null;
// What is opened where the address names no view.
let first = "overview";

function shown() {
  const wanted = location.hash.slice(1);
  return VIEWS.includes(wanted) ? wanted : first;
}

function show() {
  const current = shown();
  for (const name of VIEWS) section(name).hidden = name !== current;
  for (const link of document.querySelectorAll(".views a")) {
    if (link.hash === `#${current}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${current[0].toUpperCase()}${current.slice(1)} · loramux console`;
  render();
  views[current].shown?.();
}

function render() {
  renderStatus();
  views[shown()].render(state);
}

function renderStatus() {
  const node = byId("status");
  const { phase, live } = state;
  const words = {
    loading: ["loading", "Connecting"],
    offline: ["bad", "Disconnected"],
    locked: ["idle", "Admin key needed"],
    absent: ["idle", "No live numbers here"],
  };
  let [kind, text] = words[phase] ?? ["good", "Live"];
  if (phase === "live" && live.draining) [kind, text] = ["warn", "Draining"];
  else if (phase === "live" && !live.ready) [kind, text] = ["warn", "Not ready"];
  node.dataset.state = kind;
  setText(node, text);
  setText(byId("model"), live ? live.model : "");
}

function take(live) {
  if (live.started !== started) {
    // Another process: its points do not go on from ours.
    started = live.started;
    if (next > 0) {
      next = 0;
      state.points = [];
      return false;
    }
  }
  state.points = state.points.concat(live.points).slice(-POINTS_MAX);
  next = live.next;
  Object.assign(state, { phase: "live", live, refusal: null });
  return true;
}

function refused(error) {
  if (!(error instanceof Refused)) throw error;
  state.refusal = error;
  if (error.status === 401 || error.status === 403) state.phase = "locked";
  else if (error.status === 404) absent();
  else state.phase = "offline";
}

/** No live numbers on this port: what works here is shown first. */
function absent() {
  state.phase = "absent";
  first = "playground";
  if (!location.hash) show();
}

async function poll() {
  clearTimeout(timer);
  asking?.abort();
  const own = (asking = new AbortController());
  // A server that does not answer is as good as none.
  const limit = setTimeout(() => own.abort(), 8000);
  try {
    const live = await call("admin", "GET", `admin/v1/live?since=${next}`, { signal: own.signal });
    if (own !== asking) return;
    failures = 0;
    if (!take(live)) return void poll();
  } catch (error) {
    if (own !== asking) return;
    failures += 1;
    refused(error.name === "AbortError" ? new Refused(0, "", "the server does not answer") : error);
  } finally {
    clearTimeout(limit);
  }
  render();
  schedule();
}

function schedule() {
  clearTimeout(timer);
  // A wrong key is not tried again and again: the server counts.
  if (document.hidden || state.phase === "locked" || state.phase === "absent") return;
  timer = setTimeout(poll, Math.min(EVERY_MS * 2 ** Math.min(failures, 5), failures ? PAUSE_MAX_MS : EVERY_MS));
}

byId("keys-open").addEventListener("click", () => askKeys());
addEventListener("hashchange", () => {
  show();
  byId("content").focus({ preventScroll: true });
  scrollTo(0, 0);
});
addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (state.phase !== "locked" && state.phase !== "absent") poll();
});
let adminKey = key("admin");
addEventListener("loramux:keys", () => {
  if (adminKey === key("admin") && state.phase === "live") return;
  adminKey = key("admin");
  next = 0;
  Object.assign(state, { phase: "loading", live: null, points: [], refusal: null });
  render();
  poll();
});

show();
poll();
