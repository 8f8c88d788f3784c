// Requests to the server this page came from. Keys live in memory and in this tab's session storage, nowhere else.

const STORE = "loramux.keys";
const keys = { admin: "", api: "" };

try {
  Object.assign(keys, JSON.parse(sessionStorage.getItem(STORE) ?? "{}"));
} catch {
  // No storage, or not ours: the keys last until the page is left.
}

export const key = (kind) => keys[kind];

/** Sets both keys and tells everybody who asked. */
export function setKeys(changed) {
  Object.assign(keys, changed);
  try {
    sessionStorage.setItem(STORE, JSON.stringify(keys));
  } catch {
    // As above.
  }
  dispatchEvent(new CustomEvent("loramux:keys"));
}

/** An answer that is no success, as the API says it; `status` 0 = there was none. */
export class Refused extends Error {
  constructor(status, code, message, body) {
    super(message);
    this.status = status;
    this.code = code;
    this.body = body;
  }

  /** The message with its code. */
  get text() {
    return this.code ? `${this.message} (${this.code})` : this.message;
  }
}

async function refusal(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Something between here and the server answered.
  }
  const error = body?.error;
  const message = typeof error?.message === "string" ? error.message : `the server answered ${response.status}`;
  const code = typeof error?.code === "string" ? error.code : "";
  return new Refused(response.status, code, message, body);
}

/** `kind` says which key goes along: `admin` or `api`. Gives the response if it is a success. */
async function send(kind, method, path, { body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (keys[kind]) headers.authorization = `Bearer ${keys[kind]}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store", credentials: "same-origin", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "", "the server cannot be reached");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Sends JSON, reads JSON. */
export async function call(kind, method, path, options) {
  const response = await send(kind, method, path, options);
  try {
    return Object.assign(await response.json(), { httpStatus: response.status });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "", "the answer was cut off");
  }
}

/** Sends JSON and gives each event of the stream that comes back, parsed. */
export async function* stream(kind, path, body, signal) {
  const response = await send(kind, "POST", path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      for (const line of event.split("\n")) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const parsed = JSON.parse(data);
        if (parsed.error) throw new Refused(0, parsed.error.code ?? "", parsed.error.message ?? "the stream failed", parsed);
        yield parsed;
      }
    }
  }
}
