// One colour for each adapter, by its name: the same in every picture and after a reload, and different from its
// neighbours' as long as there are enough.

const SLOTS = 12;
const taken = new Map();

function hash(text) {
  let value = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 0x01000193) >>> 0;
  // The last bytes alone would decide the low bits.
  return (value ^ (value >>> 15)) >>> 0;
}

/** The colour class of a name; names that differ share one only where all are taken. */
export function colorOf(name) {
  if (name === "base model") return "c-base";
  let slot = taken.get(name);
  if (slot === undefined) {
    const used = new Set(taken.values());
    const first = hash(name) % SLOTS;
    slot = first;
    for (let step = 0; step < SLOTS && used.has(slot); step += 1) slot = (first + step) % SLOTS;
    if (used.has(slot)) slot = first;
    if (taken.size > 4096) taken.clear();
    taken.set(name, slot);
  }
  return `c-${slot}`;
}
