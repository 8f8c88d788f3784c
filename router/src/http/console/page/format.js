// Numbers for people.

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 12,345; 1.23 M from a million on. */
export function count(value) {
  if (value >= 1e9) return `${(value / 1e9).toFixed(2)} G`;
  if (value >= 1e6) return `${(value / 1e6).toFixed(2)} M`;
  return plain.format(value);
}

/** A rate or another small number: three digits. */
export function number(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e5) return `${(value / 1e3).toFixed(0)} k`;
  if (value >= 100 || value === 0) return plain.format(value);
  return value >= 10 ? value.toFixed(1).replace(/\.0$/, "") : value.toFixed(2).replace(/\.?0+$/, "");
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}

/** [number, unit] of a time given in seconds. */
export function timeParts(seconds) {
  if (seconds === null || seconds === undefined) return ["–", ""];
  if (seconds === 0) return ["0", "ms"];
  if (seconds >= 10) return [seconds.toFixed(1), "s"];
  if (seconds >= 1) return [seconds.toFixed(2), "s"];
  const ms = seconds * 1e3;
  if (ms >= 100) return [ms.toFixed(0), "ms"];
  if (ms >= 1) return [ms.toFixed(1), "ms"];
  return [ms.toFixed(2), "ms"];
}

export const time = (seconds) => timeParts(seconds).filter(Boolean).join(" ");

/** The same for an axis: no more digits than it needs. */
export const axisTime = (seconds) => time(seconds).replace(/\.?0+ /, (zeros) => (zeros[0] === "." ? " " : zeros));

/** How long, from days down to seconds: the two largest units. */
export function duration(seconds) {
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const at = parts.findIndex(([, size]) => seconds >= size);
  if (at < 0) return "0 s";
  const [unit, size] = parts[at];
  const first = `${Math.floor(seconds / size)} ${unit}`;
  const next = parts[at + 1];
  const rest = next ? Math.floor((seconds % size) / next[1]) : 0;
  return rest ? `${first} ${rest} ${next[0]}` : first;
}

/** Since a Unix time in seconds. */
export function ago(unixSeconds, nowMs) {
  if (!unixSeconds) return "never";
  const seconds = Math.max(0, Math.floor(nowMs / 1000) - unixSeconds);
  if (seconds < 3) return "just now";
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit} ago`;
  }
  return `${seconds} s ago`;
}

export const percent = (part, whole) => (whole > 0 ? `${((100 * part) / whole).toFixed(part && part < whole / 10 ? 1 : 0)} %` : "–");

/** What the console calls an adapter of the live numbers. */
export function nameOf(named) {
  const name = named.name ?? `content ${named.content}`;
  return named.namespace ? `${named.namespace}/${name}` : name;
}

/** The same for a set of adapters. */
export const shareName = (adapters) => (adapters.length ? adapters.map(nameOf).join(" + ") : "base model");
