// Elements without markup: whatever a server or a person named becomes text, never HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: `class`, `on` {event: listener}, `data` {..}, `text`, properties in camel case, attributes with a dash. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name in node && name !== "list" && !name.includes("-")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An SVG element with attributes. */
export function s(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Changes the text only where it differs: a screen reader or a selection is not disturbed once a second. */
export function setText(node, text) {
  const wanted = String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

export const byId = (id) => document.getElementById(id);

/** Makes `parent` hold one child for each item, in order, reusing what has the same key. */
export function reconcile(parent, items, keyOf, make, update) {
  const known = (parent.known ??= new Map());
  const wanted = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    wanted.add(key);
    let node = known.get(key);
    if (!node) {
      node = make(item);
      known.set(key, node);
    }
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  for (const [key, node] of known) {
    if (!wanted.has(key)) {
      node.remove();
      known.delete(key);
    }
  }
}

let ids = 0;

/** A label with the control it names. */
export function field(label, control, hint) {
  control.id ||= `control-${++ids}`;
  const parts = [h("label", { htmlFor: control.id, text: label }), control];
  if (hint) {
    const note = h("p", { class: "hint", id: `${control.id}-hint`, text: hint });
    control.setAttribute("aria-describedby", note.id);
    parts.push(note);
  }
  return h("div", { class: "field" }, parts);
}

/** Buttons of which one is pressed. `choices`: [value, label]. */
export function choice(label, choices, initial, onChange) {
  const group = h("div", { class: "choice", role: "group", "aria-label": label });
  const press = (value) => {
    for (const button of group.children) button.setAttribute("aria-pressed", String(button.value === value));
  };
  for (const [value, text] of choices) {
    const chosen = () => {
      press(value);
      onChange(value);
    };
    group.append(h("button", { type: "button", value, text, on: { click: chosen } }));
  }
  press(initial);
  return group;
}
