// Shows /openapi.json. Everything from the document goes in as text. The key stays in this page's memory.

let key = "";
let spec = {};

const $ = (id) => document.getElementById(id);

/** An element with attributes, then children: nodes or text. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Text with `code` in backticks. */
function prose(text) {
  const parts = String(text ?? "").split("`");
  return el("span", {}, ...parts.map((part, i) => (i % 2 ? el("code", {}, part) : part)));
}

const resolve = (schema) => schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] ?? {} : schema ?? {};
const refName = (schema) => schema?.$ref?.split("/").pop();
const headers = () => (key ? { authorization: `Bearer ${key}` } : {});

/** What a value may be, in a few words. */
function kind(schema) {
  if (!schema) return "anything";
  if (schema.$ref) {
    const target = resolve(schema);
    return target.properties || target.allOf ? refName(schema) : kind(target);
  }
  const any = schema.oneOf ?? schema.anyOf;
  if (any) return [...new Set(any.filter((one) => one.type !== "null").map(kind))].join(" or ");
  if (schema.allOf) return "object";
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const types = [schema.type].flat().filter((type) => type && type !== "null");
  if (types.includes("array")) return `array of ${kind(schema.items)}`;
  return types.join(" or ") || "anything";
}

/** Bounds and default. */
function bounds(schema) {
  const target = schema?.$ref ? { ...resolve(schema), ...schema } : schema ?? {};
  const words = [];
  if (target.minimum !== undefined) words.push(`≥ ${target.minimum}`);
  if (target.exclusiveMinimum !== undefined) words.push(`> ${target.exclusiveMinimum}`);
  if (target.maximum !== undefined) words.push(`≤ ${target.maximum}`);
  if (target.minItems !== undefined) words.push(`at least ${target.minItems}`);
  if (target.maxItems !== undefined) words.push(`at most ${target.maxItems}`);
  if (target.maxLength !== undefined) words.push(`at most ${target.maxLength} characters`);
  if (target.default !== undefined) words.push(`default ${JSON.stringify(target.default)}`);
  return words.join(", ");
}

/** Names of schemas inside one that are worth a list of their own. */
function objectsIn(schema, seen) {
  if (!schema || typeof schema !== "object") return [];
  if (schema.$ref) {
    const name = refName(schema);
    if (seen.has(name)) return [];
    const target = resolve(schema);
    return target.properties || target.allOf ? [name] : objectsIn(target, new Set([...seen, name]));
  }
  const inside = [schema.items, schema.additionalProperties, ...(schema.oneOf ?? []), ...(schema.anyOf ?? [])];
  return [...new Set(inside.flatMap((one) => objectsIn(one, seen)))];
}

/** Every field as name, schema, whether it is required, and the part of the schema it comes from. */
function properties(schema, part = "") {
  const target = resolve(schema);
  const parts = (target.allOf ?? []).map((one) => properties(one, refName(one) ?? part));
  const own = Object.entries(target.properties ?? {}).map(([name, value]) => [name, value, (target.required ?? []).includes(name), part]);
  return [...parts.flat(), ...own];
}

/** What most requests have, in the order in which they are written. */
const FIRST = [
  "model", "messages", "prompt", "input", "inputs", "system", "instructions", "max_tokens", "max_completion_tokens", "max_output_tokens",
  "temperature", "top_p", "stream", "stop", "tools", "tool_choice", "response_format", "parameters",
];
const PARTS = { AdapterFields: "Adapters", DrawingFields: "Drawing tokens", FormatFields: "Form of the reply", SamplingFields: "More" };
/** Shorter lists need no folding. */
const UNFOLDED_MAX = 20;

function fields(schema, seen = new Set()) {
  const place = ([name, , must]) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length + Number(!must));
  const rows = properties(schema).sort((a, b) => place(a) - place(b));
  if (rows.length <= UNFOLDED_MAX) return fieldList(rows, seen);
  const shown = rows.filter((row) => row[2] || FIRST.includes(row[0]));
  const whole = el("div", {}, fieldList(shown, seen));
  const rest = Map.groupBy(rows.filter((row) => !shown.includes(row)), (row) => PARTS[row[3]] ?? "More of this route");
  for (const [title, some] of [...rest].sort(([a], [b]) => Number(a === "More") - Number(b === "More"))) {
    const names = el("span", { class: "what" }, some.map((row) => row[0]).join(", "));
    whole.append(el("details", { class: "nested" }, el("summary", {}, title, names), el("div", { class: "inside" }, fieldList(some, seen))));
  }
  return whole;
}

function fieldList(rows, seen) {
  const list = el("dl", { class: "fields" });
  for (const [name, value, must] of rows) {
    const limits = bounds(value);
    const about = value.description ?? (value.oneOf ?? []).map((one) => one.description).find(Boolean);
    const cell = el("dd", {}, el("div", { class: "kind" }, kind(value) + (limits ? ` (${limits})` : "")), about ? el("div", {}, prose(about)) : null);
    for (const inner of objectsIn(value, seen)) cell.append(lazyFields(inner, seen));
    list.append(el("dt", {}, el("code", {}, name), must ? el("span", { class: "must" }, " required") : null), cell);
  }
  return list;
}

/** Fields of a named schema, made when they are opened: schemas may mention themselves. */
function lazyFields(name, seen = new Set()) {
  const box = el("details", { class: "nested" }, el("summary", {}, name));
  box.addEventListener("toggle", () => {
    if (box.open && box.children.length === 1) {
      box.append(el("div", { class: "inside" }, fields({ $ref: `#/components/schemas/${name}` }, new Set([...seen, name]))));
    }
  }, { once: true });
  return box;
}

function body(schema) {
  const target = resolve(schema);
  if (target.properties || target.allOf) return fields(schema);
  const names = schema.$ref && !objectsIn(schema, new Set()).length ? [] : objectsIn(schema, new Set());
  return el("div", {}, el("div", { class: "kind" }, kind(schema)), ...names.map((name) => lazyFields(name)));
}

function replies(operation) {
  const list = el("dl", { class: "fields" });
  for (const [status, reply] of Object.entries(operation.responses ?? {})) {
    const cell = el("dd", {}, prose(reply.description));
    for (const [type, content] of Object.entries(reply.content ?? {})) {
      const names = objectsIn(content.schema?.properties?.data?.contentSchema ?? content.schema, new Set());
      cell.append(el("div", { class: "kind" }, type), ...(Number(status) < 400 ? names.map((name) => lazyFields(name)) : []));
    }
    const more = Object.keys(reply.headers ?? {}).filter((name) => name !== "x-request-id");
    if (more.length) cell.append(el("div", { class: "kind" }, `headers: ${more.join(", ")}`));
    list.append(el("dt", {}, el("code", {}, status)), cell);
  }
  return list;
}

/** Shows an answer as it comes. */
async function show(answer, head, output) {
  head.textContent = `${answer.status} ${answer.statusText} · ${answer.headers.get("content-type") ?? "no body"} · ${answer.headers.get("x-request-id") ?? ""}`;
  const type = answer.headers.get("content-type") ?? "";
  const reader = answer.body?.getReader();
  if (!reader) return;
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    text += done ? decoder.decode() : decoder.decode(value, { stream: true });
    if (done || type.startsWith("text/event-stream")) output.textContent = text.slice(-200000);
    if (done) break;
  }
  if (type.startsWith("application/json")) {
    try { output.textContent = JSON.stringify(JSON.parse(text), null, 2).slice(0, 200000); } catch { /* shown as it is */ }
  }
}

function tryIt(method, path, operation) {
  const id = operation.operationId;
  const form = el("form", { autocomplete: "off" });
  const inputs = [];
  for (const parameter of operation.parameters ?? []) {
    const input = el("input", { id: `${id}-${parameter.name}`, name: parameter.name, type: parameter.name.includes("token") ? "password" : "text", autocomplete: "off" });
    if (parameter.required) input.required = true;
    inputs.push([parameter, input]);
    form.append(el("div", { class: "row" }, el("label", { for: input.id }, `${parameter.name} (${parameter.in})`), input));
  }
  const json = operation.requestBody?.content?.["application/json"];
  let area = null;
  if (json) {
    area = el("textarea", { id: `${id}-body`, spellcheck: "false" });
    area.value = JSON.stringify(json.example ?? {}, null, 2);
    area.rows = Math.min(area.value.split("\n").length + 1, 24);
    form.append(el("label", { for: area.id }, "Body"), area);
  }
  const send = el("button", { type: "submit" }, "Send");
  const stop = el("button", { type: "button", disabled: "" }, "Stop");
  const head = el("p", { class: "kind", role: "status" });
  const output = el("pre", { tabindex: "0", "aria-label": "Answer", hidden: "" });
  form.append(el("div", { class: "row" }, send, stop), head, output);
  let abort = null;
  stop.addEventListener("click", () => abort?.abort());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    abort = new AbortController();
    [send.disabled, stop.disabled, output.hidden, output.textContent] = [true, false, false, ""];
    head.textContent = "Waiting…";
    const request = { method, headers: headers(), signal: abort.signal, cache: "no-store" };
    const query = new URLSearchParams();
    let url = path;
    for (const [parameter, input] of inputs) {
      if (!input.value) continue;
      if (parameter.in === "path") url = url.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
      if (parameter.in === "query") query.set(parameter.name, input.value);
      if (parameter.in === "header") request.headers[parameter.name] = input.value;
    }
    if (area) {
      request.body = area.value;
      request.headers["content-type"] = "application/json";
    }
    try {
      await show(await fetch(query.size ? `${url}?${query}` : url, request), head, output);
    } catch (error) {
      head.textContent = error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`;
    }
    [send.disabled, stop.disabled] = [false, true];
  });
  return form;
}

function operationBox(method, path, operation) {
  const verb = method.toUpperCase();
  const box = el("details", { id: operation.operationId },
    el("summary", {}, el("span", { class: `verb ${verb}` }, verb), el("span", { class: "path" }, path), el("span", { class: "what" }, operation.summary ?? "")));
  box.addEventListener("toggle", () => {
    if (!box.open || box.children.length > 1) return;
    const inside = el("div", { class: "inside" });
    if (operation.description) inside.append(el("p", {}, prose(operation.description)));
    inside.append(el("p", { class: "kind" }, operation.security ? "Needs a key." : "Needs no key."));
    for (const parameter of operation.parameters ?? []) {
      inside.append(el("p", {}, el("code", {}, parameter.name), ` in ${parameter.in}: `, prose(parameter.description), ` ${bounds(parameter.schema)}`));
    }
    inside.append(el("h3", {}, "Try it"), tryIt(verb, path, operation));
    const json = operation.requestBody?.content?.["application/json"];
    if (json) inside.append(el("h3", {}, "Fields of the body"), body(json.schema));
    inside.append(el("h3", {}, "Answers"), replies(operation));
    box.append(inside);
  });
  return box;
}

function render() {
  $("version").textContent = spec.info.version;
  $("about").replaceChildren(prose(spec.info.description));
  $("contents").replaceChildren();
  document.querySelectorAll("main section").forEach((section) => section.remove());
  for (const { name } of spec.tags ?? []) {
    const links = el("ul", {});
    const section = el("section", {}, el("h2", {}, name));
    for (const [path, item] of Object.entries(spec.paths)) {
      for (const [method, operation] of Object.entries(item)) {
        if (!operation.tags?.includes(name)) continue;
        section.append(operationBox(method, path, operation));
        const link = el("a", { href: `#${operation.operationId}` }, el("span", { class: `verb ${method.toUpperCase()}` }, method.toUpperCase()), ` ${path}`);
        link.addEventListener("click", () => { $(operation.operationId).open = true; });
        links.append(el("li", {}, link));
      }
    }
    $("contents").append(el("strong", {}, name), links);
    $("routes").append(section);
  }
  const wanted = location.hash.slice(1);
  if (wanted && $(wanted) instanceof HTMLDetailsElement) $(wanted).open = true;
}

async function load() {
  const state = $("state");
  state.textContent = "Loading the document…";
  try {
    const answer = await fetch("/openapi.json", { headers: headers(), cache: "no-store" });
    if (answer.status === 401) { state.textContent = "This server needs an API key."; $("key").focus(); return; }
    const document = await answer.json();
    if (!answer.ok) { state.textContent = document.error?.message ?? `The answer is ${answer.status}.`; return; }
    spec = document;
    state.textContent = "";
    render();
  } catch (error) {
    state.textContent = `The document cannot be loaded: ${error.message}`;
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  load();
});
load();
