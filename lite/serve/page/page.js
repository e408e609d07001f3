/** A page to drop a film on: where films come from, keys, how it looks, and what the server says of itself. */

import { $, button, el, facts, failure, memory, say, size } from "./dom.js";
import * as history from "./history.js";
import * as server from "./server.js";
import * as studies from "./studies.js";
import * as viewer from "./viewer.js";

// --- Films: chosen, dropped (folders, too) or pasted

async function* within(entry) {
  if (entry.isFile) return yield await new Promise((resolve, reject) => entry.file(resolve, reject));
  const reader = entry.createReader();
  const some = () => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
  for (let batch; (batch = await some()).length; ) for (const inner of batch) yield* within(inner);
}

async function dropped({ files, items }) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return studies.add([...files]);
  const found = [];
  for (const entry of entries) for await (const file of within(entry)) found.push(file);
  return studies.add(found.filter((file) => !file.name.startsWith(".")));
}

function listenForFilms() {
  const over = (is) => document.body.classList.toggle("over", is);
  $("files").addEventListener("change", () => {
    studies.add([...$("files").files]);
    $("files").value = "";
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  addEventListener("dragleave", (event) => event.relatedTarget ?? over(false));
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    dropped(event.dataTransfer);
  });
  addEventListener("paste", ({ clipboardData }) => studies.add([...clipboardData.files]));
}

// --- Keys: those of a single letter where nothing is being typed, and only if they are wanted

const SINGLE = {
  o: () => $("files").click(),
  j: () => studies.step(1),
  k: () => studies.step(-1),
  r: () => $("reason").focus(),
  c: () => studies.latest()?.copy(),
  s: () => $("shading").click(),
  "?": () => $("help").showModal(),
};
const TYPED = "textarea, select, input[type=number]";

function keyPressed(event) {
  const held = event.ctrlKey || event.metaKey || event.altKey;
  if ($("help").open) return;
  if (event.key === "Enter" && held) studies.draftShown();
  else if (event.key === "Escape") studies.stop();
  else if (SINGLE[event.key] && !held && $("use-keys").checked && !event.target.closest(TYPED)) SINGLE[event.key]();
  else return;
  event.preventDefault();
}

function listenForKeys() {
  addEventListener("keydown", keyPressed);
  $("help-open").addEventListener("click", SINGLE["?"]);
  $("help-close").addEventListener("click", () => $("help").close());
}

// --- How it looks, and what this browser remembers of that

const CHOICES = { theme: "", shading: true, "use-keys": true };

function look() {
  document.documentElement.dataset.theme = $("theme").value;
  document.body.classList.toggle("shaded", $("shading").checked);
}

function listenForChoices() {
  for (const [id, otherwise] of Object.entries(CHOICES)) {
    const property = typeof otherwise === "string" ? "value" : "checked";
    $(id)[property] = memory.get(id, otherwise);
    $(id).addEventListener("change", () => {
      memory.set(id, $(id)[property]);
      look();
    });
  }
  look();
  const heights = new ResizeObserver(() => {
    const [notice, top] = [$("notice").offsetHeight, $("top").offsetHeight];
    document.documentElement.style.setProperty("--notice", `${notice}px`);
    document.documentElement.style.setProperty("--above", `${notice + top}px`);
  });
  for (const id of ["notice", "top"]) heights.observe($(id));
}

// --- What the server says of itself

function tell(about) {
  const { artifact_id: id, engine, backend, device, fallbacks, limits } = about;
  $("server").textContent = `${about.model} · ${backend} on ${device}`;
  const [first, ...rest] = about.notice.split(/(?<=\.) /);
  $("notice").replaceChildren(el("strong", {}, first), ` ${rest.join(" ")}`);
  $("max_new_tokens").max = limits.max_new_tokens;
  $("max_new_tokens").placeholder = `at most ${limits.max_new_tokens}`;
  $("models").hidden = !about.adapters.length;
  const models = [el("option", {}, about.model), ...about.adapters.map((name) => el("option", {}, name))];
  $("model").replaceChildren(...models);
  studies.setMaxBytes(limits.max_body_bytes);
  const rows = [
    ["Artifact", el("code", {}, id)],
    ["Adapters", about.adapters.join(", ")],
    ["Version", about.version],
    ["Decoder", `${engine} (${backend}) on ${device}, ${about.dtype}, cache ${about.cache_dtype}`],
    ["Rows", `${about.rows}: so many films are drafted at a time`],
    ["Memory, planned", Object.entries(about.plan).map(([part, bytes]) => `${part}: ${size(bytes)}`)],
    ["Fallbacks", fallbacks.length ? fallbacks : "none"],
    ["DICOM", about.reads_dicom ? "" : "not read: pydicom is not installed where the server runs"],
    ["Licence", about.licence],
  ];
  $("about-facts").replaceChildren(...facts(rows));
}

async function meetServer() {
  try {
    await server.ready((why) => ($("server").textContent = `Waiting: ${why} …`));
    tell(await server.about());
    say("The model is ready.");
  } catch (error) {
    $("server").replaceChildren(failure(error.message, button("Try again", meetServer)));
  }
}

for (const { listen } of [history, studies, viewer]) listen();
listenForFilms();
listenForKeys();
listenForChoices();
meetServer();
