// Two models, one prompt, side by side.

import { Refused, call, key, stream } from "./api.js";
import { colorOf } from "./colors.js";
import { askKeys } from "./dialogs.js";
import { choice, field, h, reconcile, setText } from "./dom.js";
import { count, number, time } from "./format.js";

const OPTIONS_MAX = 50;
const TEXT_MAX = 200_000;

export function playgroundView(root) {
  let mode = "chat";
  let models = [];
  let base = "";
  let hasAsked = false;
  let running = null;

  const notice = h("p", { class: "notice", role: "alert", hidden: true });
  const system = h("textarea", { rows: 1, spellcheck: false, placeholder: "You are a helpful assistant." });
  const systemField = field("System message", system);
  const prompt = h("textarea", { rows: 3, value: "Tell me about the sea." });
  const parameter = (value, attributes) => h("input", { type: "number", value, inputMode: "decimal", ...attributes });
  const inputs = {
    max_tokens: parameter("128", { min: "1", step: "1" }),
    temperature: parameter("0.7", { min: "0", max: "2", step: "0.1" }),
    top_p: parameter("1", { min: "0", max: "1", step: "0.05" }),
    seed: parameter("", { step: "1", placeholder: "random" }),
  };
  const run = h("button", { type: "submit", class: "primary", text: "Run both" });
  const stop = h("button", { type: "button", class: "danger", text: "Stop", disabled: true, on: { click: () => running?.abort() } });
  const form = h("form", { class: "panel ask", noValidate: true, "aria-label": "Request" },
    h("div", { class: "panel-head" }, h("h2", { text: "Prompt" }), choice("Kind of request", [["chat", "Chat"], ["completion", "Completion"]], mode, (value) => {
      mode = value;
      systemField.hidden = value !== "chat";
    })),
    systemField, field("Prompt", prompt),
    h("div", { class: "parameters" }, field("Max tokens", inputs.max_tokens), field("Temperature", inputs.temperature),
      field("Top p", inputs.top_p), field("Seed", inputs.seed)),
    h("div", { class: "ask-end" }, h("p", { class: "hint", text: "Ctrl + Enter runs, Esc stops" }), stop, run));
  const known = () => ({ models, base });
  const lanes = [lane("Left", known), lane("Right", known)];
  root.append(notice, form, h("div", { class: "lanes" }, lanes.map((one) => one.root)));

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  root.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start();
    } else if (event.key === "Escape") running?.abort();
  });
  addEventListener("loramux:keys", () => {
    hasAsked = false;
    if (!root.hidden) learn();
  });

  async function learn() {
    if (hasAsked) return;
    hasAsked = true;
    try {
      const list = await call("api", "GET", "v1/models");
      models = list.data.map((model) => model.id);
      base = list.data.find((model) => !model.parent)?.id ?? models[0] ?? "";
      const adapters = list.data.filter((model) => model.parent).map((model) => model.id);
      lanes[0].suggest(base);
      lanes[1].suggest(adapters[0] ?? base);
      notice.hidden = true;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      hasAsked = false;
      notice.hidden = false;
      if (error.status === 401) notice.replaceChildren(...wantsKey());
      else notice.replaceChildren(`The models could not be listed: ${error.text}.`);
    }
  }

  function body(model) {
    const fields = { model, stream: true, stream_options: { include_usage: true } };
    for (const [name, input] of Object.entries(inputs)) if (input.value !== "") fields[name] = Number(input.value);
    if (mode === "completion") return ["v1/completions", { ...fields, prompt: prompt.value }];
    const messages = [{ role: "user", content: prompt.value }];
    if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
    return ["v1/chat/completions", { ...fields, messages }];
  }

  async function start() {
    if (running) return;
    running = new AbortController();
    run.disabled = true;
    stop.disabled = false;
    try {
      await Promise.all(lanes.map((one) => one.run(body, running.signal)));
    } finally {
      running = null;
      run.disabled = false;
      stop.disabled = true;
    }
  }

  return {
    shown: learn,
    render() {},
  };
}

function wantsKey() {
  const said = key("api") ? "This API key was refused: enter another under " : "This server needs an API key: enter it under ";
  return [said, h("button", { type: "button", class: "link", text: "Keys", on: { click: () => askKeys() } }), "."];
}

/** One model's side. */
function lane(side, known) {
  const options = h("datalist", { id: `models-${side}` });
  const model = h("input", { type: "text", list: options.id, autocomplete: "off", spellcheck: false, autocapitalize: "off", class: "model" });
  const swatch = h("i", { class: "swatch c-base" });
  const output = h("div", { class: "output", tabIndex: 0, role: "region", "aria-label": `${side} answer` });
  const empty = h("p", { class: "empty", text: "The answer streams in here." });
  const text = h("p", { class: "answer", hidden: true });
  const error = h("p", { class: "error", role: "alert", hidden: true });
  output.append(empty, text, error);
  const facts = Object.fromEntries(["First token", "Speed", "Tokens", "End"].map((name) => [name, h("dd", { text: "–" })]));
  const done = h("p", { class: "unseen", role: "status" });
  const root = h("section", { class: "panel lane", "aria-label": `${side} model` },
    h("div", { class: "lane-head" }, swatch, field(`${side} model`, model), options), output,
    h("dl", { class: "lane-facts" }, Object.entries(facts).map(([name, value]) => h("div", {}, h("dt", { text: name }), value))), done);

  function list() {
    const wanted = model.value.toLowerCase();
    const found = known().models.filter((id) => id.toLowerCase().includes(wanted)).slice(0, OPTIONS_MAX);
    reconcile(options, found, (id) => id, (id) => h("option", { value: id }), () => {});
    paint(model.value.trim());
  }
  function paint(id) {
    swatch.className = `swatch ${colorOf(id === known().base ? "base model" : id)}`;
  }
  model.addEventListener("input", list);
  model.addEventListener("focus", list);

  let suggested = "";
  let frame = 0;
  return {
    root,
    /** Fills in a model unless somebody chose one. */
    suggest(id) {
      if (model.value === suggested) model.value = suggested = id;
      list();
    },
    async run(bodyOf, signal) {
      const id = model.value.trim() || known().base;
      paint(id);
      const began = performance.now();
      const seen = { text: "", shown: 0, tokens: 0, first: null, last: null, end: "" };
      text.textContent = "";
      text.hidden = empty.hidden = error.hidden = true;
      empty.hidden = false;
      setText(empty, "Waiting for the first token…");
      output.setAttribute("aria-busy", "true");
      root.classList.add("is-running");
      for (const value of Object.values(facts)) setText(value, "–");
      try {
        const [path, body] = bodyOf(id);
        for await (const event of stream("api", path, body, signal)) take(event, seen, began);
        seen.end ||= "closed";
      } catch (failure) {
        if (failure.name === "AbortError") seen.end = "stopped";
        else {
          seen.end = "error";
          error.hidden = false;
          setText(error, failure instanceof Refused ? failure.text : "the stream broke off");
        }
      }
      paintText(seen);
      output.removeAttribute("aria-busy");
      root.classList.remove("is-running");
      if (!seen.text) {
        empty.hidden = seen.end === "error";
        setText(empty, seen.end === "stopped" ? "Stopped before the first token." : "The answer is empty.");
      }
      setText(done, `${id}: ${seen.end}, ${seen.tokens} tokens`);
    },
  };

  function take(event, seen, began) {
    const now = performance.now();
    if (event.usage) seen.tokens = event.usage.completion_tokens;
    for (const { delta, text: piece, finish_reason: end } of event.choices ?? []) {
      const more = piece ?? `${delta?.reasoning_content ?? ""}${delta?.content ?? ""}`;
      if (end) seen.end = end;
      if (!more) continue;
      seen.first ??= now - began;
      seen.last = now - began;
      seen.tokens += 1;
      if (seen.text.length < TEXT_MAX) seen.text += more;
    }
    // Once a frame is as fast as anybody can look; once a token would keep the page from doing anything else.
    frame ||= requestAnimationFrame(() => paintText(seen));
  }

  function paintText(seen) {
    cancelAnimationFrame(frame);
    frame = 0;
    if (seen.text.length > seen.shown) {
      const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
      empty.hidden = true;
      text.hidden = false;
      text.append(seen.text.slice(seen.shown));
      text.normalize();
      seen.shown = seen.text.length;
      if (atEnd) output.scrollTop = output.scrollHeight;
    }
    measure(seen);
  }

  function measure(seen) {
    const seconds = (seen.last - seen.first) / 1000;
    setText(facts["First token"], seen.first === null ? "–" : time(seen.first / 1000));
    setText(facts.Speed, seen.tokens > 1 && seconds > 0 ? `${number((seen.tokens - 1) / seconds)} tok/s` : "–");
    setText(facts.Tokens, count(seen.tokens));
    setText(facts.End, seen.end || "–");
  }
}
