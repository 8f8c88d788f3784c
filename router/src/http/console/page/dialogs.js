// What asks before it acts: keys, loading, pinning, unloading. An error stays in its dialog, in the API's words.

import { Refused, call, key, setKeys } from "./api.js";
import { byId, field, h, setText } from "./dom.js";

/** Says once what happened. */
export function toast(text) {
  const node = h("p", { class: "toast", text });
  byId("toasts").append(node);
  setTimeout(() => node.remove(), 6000);
}

const path = (adapter, rest = "") =>
  `admin/v1/adapters/${encodeURIComponent(adapter.name)}${rest}${adapter.namespace ? `${rest.includes("?") ? "&" : "?"}namespace=${encodeURIComponent(adapter.namespace)}` : ""}`;

let titles = 0;

/**
 * A modal dialog with a form. `act` runs at its main button and may throw a [`Refused`]; what it returns is given to the
 * caller, `undefined` if the dialog was left.
 */
function ask({ title, content, action, isDanger, act }) {
  const heading = h("h2", { id: `dialog-${++titles}`, text: title });
  const error = h("div", { class: "error", role: "alert", hidden: true });
  const go = h("button", { type: "submit", class: isDanger ? "danger" : "primary", text: action });
  const leave = h("button", { type: "button", class: "quiet", text: "Cancel", on: { click: () => dialog.close() } });
  const form = h("form", { noValidate: true }, heading, content, error, h("div", { class: "dialog-end" }, leave, go));
  const dialog = h("dialog", { "aria-labelledby": heading.id }, form);
  const from = document.activeElement;
  document.body.append(dialog);
  return new Promise((resolve) => {
    let result;
    dialog.addEventListener("close", () => {
      dialog.remove();
      from?.focus?.();
      resolve(result);
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      go.disabled = true;
      error.hidden = true;
      try {
        result = await act();
        dialog.close();
      } catch (failure) {
        if (!(failure instanceof Refused)) throw failure;
        error.replaceChildren(h("p", { text: failure.text }), ...reasons(failure));
        error.hidden = false;
      } finally {
        go.disabled = false;
      }
    });
    dialog.showModal();
  });
}

/** What a refused load's report adds. */
function reasons(failure) {
  const refusals = failure.body?.report?.refusals ?? [];
  const others = refusals.filter((refusal) => !failure.message.includes(refusal.message));
  return others.length ? [h("ul", {}, others.map((refusal) => h("li", { text: `${refusal.message} (${refusal.code})` })))] : [];
}

const secret = (value) => h("input", { type: "password", value, autocomplete: "off", spellcheck: false });

/** Asks for both keys. */
export function askKeys() {
  const admin = secret(key("admin"));
  const api = secret(key("api"));
  return ask({
    title: "Keys",
    content: [
      h("p", { class: "hint", text: "They are sent to this server only, and kept for as long as this tab is open. Leave a field empty where the server asks for no key." }),
      field("Admin key", admin, "For live numbers and adapters (--admin-key)."),
      field("API key", api, "For the playground (--api-key)."),
    ],
    action: "Use these keys",
    async act() {
      setKeys({ admin: admin.value.trim(), api: api.value.trim() });
    },
  });
}

/** What stands in a view's place where the live numbers may not be read. */
export function gate() {
  const title = h("h2");
  const why = h("p");
  const said = h("p", { class: "error", role: "alert", hidden: true });
  const input = secret("");
  const form = h("form", { noValidate: true, class: "gate-form" }, field("Admin key", input), h("button", { type: "submit", class: "primary", text: "Show live numbers" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    setKeys({ admin: input.value.trim() });
  });
  const where = h("p", {}, "The operator's own listener shows everything: its address is in the line that the server prints at its start (",
    h("code", { text: "--admin-listen" }), "). To open it here too, start the server with ",
    h("code", { text: "--admin-key" }), ". The ", h("a", { href: "#playground", text: "playground" }), " works on this port.");
  const root = h("section", { class: "gate", hidden: true, "aria-label": "Access" }, title, why, form, said, where);
  return {
    root,
    render({ phase, refusal }) {
      root.hidden = phase !== "locked" && phase !== "absent";
      if (root.hidden) return;
      form.hidden = phase === "absent";
      where.hidden = phase !== "absent";
      said.hidden = phase === "absent" || !key("admin");
      if (!said.hidden) setText(said, refusal.status === 401 ? "This admin key was refused." : refusal.text);
      setText(title, phase === "absent" ? "This port shows no live numbers" : "Live numbers need the admin key");
      setText(why, phase === "absent" ? "What runs here, and for whom, is the operator's business: this port answers it only where an admin key is set."
        : "Names, memory and traffic of all tenants are the operator's business. The key stays in this tab.");
    },
  };
}

/** Registers an adapter, or gives a name new content. */
export function askLoad(adapter) {
  const text = (value = "") => h("input", { type: "text", value, autocomplete: "off", spellcheck: false, autocapitalize: "off" });
  const name = text(adapter?.name);
  const ref = text(adapter?.ref);
  const revision = text();
  const namespace = text(adapter?.namespace);
  const scale = h("input", { type: "number", value: adapter ? String(adapter.scale) : "1", step: "0.1", min: "-8", max: "8" });
  const pinned = h("input", { type: "checkbox", checked: adapter?.pinned ?? false, id: "load-pinned" });
  return ask({
    title: "Load an adapter",
    content: [
      field("Name", name, "What requests say as model."),
      field("Reference", ref, "org/repo on the hub, s3://bucket/prefix, gs://.., https://.., or an allowed directory."),
      h("div", { class: "columns" }, field("Revision", revision, "Hub only; empty = main."), field("Namespace", namespace, "Empty = shared by all keys.")),
      h("div", { class: "columns" }, field("Scale", scale, "Multiplies alpha / r."),
        h("div", { class: "field check" }, h("div", {}, pinned, h("label", { htmlFor: "load-pinned", text: "Keep in host memory" })))),
    ],
    action: "Load",
    async act() {
      const body = { ref: ref.value.trim(), pinned: pinned.checked };
      if (scale.value !== "") body.scale = Number(scale.value);
      if (revision.value.trim()) body.revision = revision.value.trim();
      if (namespace.value.trim()) body.namespace = namespace.value.trim();
      if (!name.value.trim()) throw new Refused(0, "", "a name is required");
      const view = await call("admin", "PUT", path({ name: name.value.trim() }, "?wait=5s"), { body });
      toast(view.httpStatus === 202 ? `${view.name} is still loading` : `${view.name} is ready`);
      return view;
    },
  });
}

/** Keeps an adapter in host memory or on the device. */
export function askPin(adapter) {
  const radio = (value, label, hint, checked) => {
    const input = h("input", { type: "radio", name: "residency", value, checked, id: `pin-${value}` });
    return h("div", { class: "field check" }, h("div", {}, input, h("label", { htmlFor: input.id, text: label })), h("p", { class: "hint", text: hint }));
  };
  const group = h("fieldset", {}, h("legend", { text: "Where it stays" }),
    radio("device", "On the device", "Always ready to run. Takes its pages from the KV cache for good.", adapter.pin !== "host"),
    radio("host", "In host memory", "Never read from disk again; may leave the device.", adapter.pin === "host"));
  return ask({
    title: `Pin ${adapter.name}`,
    content: [group],
    action: "Pin",
    async act() {
      const residency = group.querySelector("input:checked").value;
      const view = await call("admin", "POST", path(adapter, "/pin"), { body: { residency } });
      toast(`${adapter.name} is pinned ${residency === "device" ? "on the device" : "in host memory"}`);
      return view;
    },
  });
}

/** Takes the pin away. */
export function askUnpin(adapter) {
  return ask({
    title: `Unpin ${adapter.name}`,
    content: [h("p", { text: "It becomes an ordinary part of the cache: it may leave the device and host memory when others need them." })],
    action: "Unpin",
    async act() {
      const view = await call("admin", "POST", path(adapter, "/unpin"), { body: {} });
      toast(`${adapter.name} is not pinned any more`);
      return view;
    },
  });
}

/** Takes a name away. */
export function askUnload(adapter) {
  const now = h("input", { type: "checkbox", id: "unload-now" });
  const purge = h("input", { type: "checkbox", id: "unload-purge" });
  const used = adapter.running + adapter.waiting;
  const running = used ? `${used === 1 ? "1 sequence uses" : `${used} sequences use`} it and will finish.` : "Nothing uses it now.";
  return ask({
    title: `Unload ${adapter.name}`,
    isDanger: true,
    content: [
      h("p", { text: `New requests for this name are refused at once. ${running}` }),
      h("div", { class: "field check" }, h("div", {}, now, h("label", { htmlFor: "unload-now", text: "End running requests with an error" }))),
      h("div", { class: "field check" }, h("div", {}, purge, h("label", { htmlFor: "unload-purge", text: "Delete its download from the disk" }))),
    ],
    action: "Unload",
    async act() {
      const view = await call("admin", "DELETE", path(adapter, `?mode=${now.checked ? "now" : "drain"}&purge=${purge.checked}`));
      toast(`${adapter.name} is unloaded`);
      return view;
    },
  });
}
