// One colour for each adapter, by its name alone: the same in every picture, in every tab, on every machine.

const HUES = 72;
const TONES = ["a", "b"];
// Any number serves; with this one the demo's adapters lie far apart.
const START = 1179;

// The page's policy lets no style in from markup; rules made by a script of its own are no markup.
const sheet = new CSSStyleSheet();
sheet.replaceSync(Array.from({ length: HUES }, (_, hue) => TONES.map((tone) =>
  `.c-${hue}${tone} { background: oklch(var(--tone-${tone}) var(--tone-c) ${(hue * 360) / HUES}); }`)).flat().join("\n"));
document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];

function hash(text) {
  let value = START;
  for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 0x01000193) >>> 0;
  // Every bit of the name reaches every bit of the hash: names often differ in their last letter only.
  value = Math.imul(value ^ (value >>> 16), 0x85ebca6b) >>> 0;
  value = Math.imul(value ^ (value >>> 13), 0xc2b2ae35) >>> 0;
  return (value ^ (value >>> 16)) >>> 0;
}

/** The colour class of a name. Two names may be alike: what was seen before must not change a colour. */
export function colorOf(name) {
  if (name === "base model") return "c-base";
  const value = hash(name);
  return `c-${value % HUES}${TONES[(value >>> 16) % TONES.length]}`;
}
