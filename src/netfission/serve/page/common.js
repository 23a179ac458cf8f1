// What the drawing of all answers shares. Text is inserted as text, never as markup.
export const SPACE = "\u00a0"; // lines do not break at it

export function make(tag, text, ...classes) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  element.classList.add(...classes);
  return element;
}

// As `printable` in netfission.utils.text: escapes for characters that cannot be seen, or that turn the order of a
// line, and with it that of a number beside a name. Of all strings in what the server answers, and of all keys.
const UNSEEN = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu;
const SHORT = { "\t": "\\t", "\n": "\\n", "\r": "\\r" };
const escaped = (letter) => {
  const digits = letter.codePointAt(0).toString(16);
  return SHORT[letter] ?? (digits.length > 2 ? `\\u${digits.padStart(4, "0")}` : `\\x${digits.padStart(2, "0")}`);
};
export function printable(value) {
  if (typeof value === "string") return value.replace(UNSEEN, escaped);
  if (Array.isArray(value)) return value.map(printable);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map((entry) => printable(entry)));
}

export function bar(share) {
  const element = make("span", undefined, "bar");
  element.style.setProperty("--share", Math.min(1, Math.max(0, share)));
  element.setAttribute("aria-hidden", "true");
  return element;
}

/* ---- numbers ---- */

// As `rounded` in netfission.utils.text: 0 and the largest number stand for nothing but themselves.
export function rounded(number, digits, most = Infinity) {
  const text = number.toFixed(digits);
  const step = 10 ** -digits;
  if (number > 0 && Number(text) === 0) return `<${SPACE}${step.toFixed(digits)}`;
  if (number < most && Number(text) === most) return `>${SPACE}${(most - step).toFixed(digits)}`;
  return text;
}
export const bare = (share) => rounded(100 * share, 1, 100);
export const percent = (share) => `${bare(share)}${SPACE}%`;
// A softmax is never exactly 0 or 1, whatever float32 rounds it to.
export const unsaturated = (share) => Math.min(Math.max(share, 1e-9), 1 - 1e-9);
export const probability = (share) => percent(unsaturated(share));
export const setting = (share) => `${Number((100 * share).toPrecision(6))}${SPACE}%`;
export const sum = (values) => values.reduce((total, value) => total + value, 0);
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
