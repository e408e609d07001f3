/** The document's elements. Every text goes in as text: none that comes from a file or the model is ever markup. */

export const $ = (id) => document.getElementById(id);

/** Make an element. Of its attributes a function is a listener; what is null or false is left out. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter(Boolean));
  return made;
}

export const button = (label, click) => el("button", { type: "button", click }, label);
export const quiet = (...children) => el("p", { class: "quiet" }, ...children);

/** Say something to who listens to the page: a sentence, never a token. */
export const say = (text) => ($("said").textContent = text);

/** Show an error in its parts: it is "got · expected · what to do". */
export function failure(message, action) {
  const [got, ...rest] = message.split(" · ");
  const parts = [el("strong", {}, got), ...rest.map((part) => el("span", {}, part))];
  return el("div", { class: "failure" }, el("p", {}, ...parts), action);
}

/** The rows of a list of facts; one without a value is left out. */
export function facts(rows) {
  const lines = (value) => (Array.isArray(value) ? value.map((item) => el("p", {}, item)) : [value]);
  return rows.flatMap(([name, value]) => (value ? [el("dt", {}, name), el("dd", {}, ...lines(value))] : []));
}

export function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const bytes = (base64) => Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
export const seconds = (value) => (value < 0.0995 ? `${Math.round(1e3 * value)} ms` : `${value.toFixed(value < 9.95 ? 1 : 0)} s`);

export function size(number) {
  const power = number ? Math.min(3, Math.floor(Math.log2(number) / 10)) : 0;
  const value = number / 2 ** (10 * power);
  return `${value >= 100 || !power ? Math.round(value) : value.toPrecision(3)} ${["bytes", "KiB", "MiB", "GiB"][power]}`;
}

/** What this browser remembers of the page. It may forbid that: then it forgets. */
export const memory = {
  get(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`llava-rad-lite.${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`llava-rad-lite.${name}`, JSON.stringify(value));
    } catch {
      say("This browser keeps nothing for this page.");
    }
  },
};
