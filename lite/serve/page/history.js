/** What this browser keeps, if it is asked to: texts and names, never films. Off at first: a workstation is shared. */

import { $, el, memory, quiet } from "./dom.js";

const MOST = 50;

function show() {
  const kept = memory.get("history", []);
  $("keep").checked = memory.get("keep", false);
  $("history-count").textContent = kept.length ? `(${kept.length})` : "";
  $("forget").hidden = !kept.length;
  const item = ({ when, film, asked, text, artifact_id: id }) => {
    const summary = el("summary", {}, film, " ", el("time", { datetime: when }, new Date(when).toLocaleString()));
    const made = quiet("Artifact ", el("code", {}, id));
    return el("li", {}, el("details", {}, summary, quiet(asked || "without a reason"), el("p", {}, text), made));
  };
  $("kept").replaceChildren(...kept.map(item));
}

export function keep({ name: film, told: asked, text, result: { artifact_id } }) {
  if (!memory.get("keep", false)) return;
  const entry = { when: new Date().toISOString(), film, asked, text, artifact_id };
  memory.set("history", [entry, ...memory.get("history", [])].slice(0, MOST));
  show();
}

function forget() {
  memory.set("history", []);
  $("keep").focus();
  show();
}

export function listen() {
  $("keep").addEventListener("change", () => {
    memory.set("keep", $("keep").checked);
    if (!$("keep").checked) forget();
  });
  $("forget").addEventListener("click", forget);
  addEventListener("storage", show); // another window of this page
  show();
}
