/** The films of this page, one of them shown: read one after another, drafted in turn or together. */

import { Draft } from "./draft.js";
import { $, button, bytes, el, failure, say, size } from "./dom.js";
import { keep } from "./history.js";
import * as server from "./server.js";
import * as viewer from "./viewer.js";

const SETTINGS = { reason: "", query: "", max_new_tokens: "", any_film: false, rendering: "" };
const RENDERS = ["any_film", "rendering"]; // the film is read anew
// A browser opens six connections to a host: one stays free for films.
const MOST_AT_ONCE = 5;

const studies = [];
let shown = null;
let maxBytes = Infinity;
let reading = Promise.resolve();
let all = null; // the AbortController of what was started for all films

export const setMaxBytes = (given) => (maxBytes = given);
export const latest = () => shown?.drafts.find((draft) => draft.result);
const pending = (study) => study.film && !study.controller && !study.drafts.some((draft) => draft.result);

export function add(files) {
  for (const file of files) {
    const study = { file, settings: { ...SETTINGS }, drafts: [], view: viewer.freshView(), controller: null };
    studies.push(study);
    $("list").append(row(study));
    read(study);
  }
  if (!shown && files.length) show(studies[0]);
  if (files.length > 1) say(`${files.length} films were added.`);
}

function row(study) {
  const { name } = study.file;
  study.status = el("small");
  study.picture = el("canvas", { width: 80, height: 80, "aria-hidden": true });
  study.open = button(study.picture, () => show(study));
  study.open.append(el("span", {}, el("b", {}, name), study.status));
  study.open.className = "open";
  const remove = el("button", { type: "button", class: "plain", "aria-label": `Remove ${name}`, click: () => drop(study) }, "×");
  return (study.item = el("li", {}, study.open, remove));
}

function drop(study) {
  study.controller?.abort();
  const place = studies.indexOf(study);
  studies.splice(place, 1);
  study.item.remove();
  const next = studies[Math.min(place, studies.length - 1)];
  if (shown === study) show(next ?? null);
  (next?.open ?? $("files")).focus();
  arrange();
}

function mark(study, kind, text = kind) {
  study.item.className = kind;
  study.status.textContent = text;
  arrange();
}

/** Have the server render a film, after those before it. */
function read(study) {
  Object.assign(study, { film: null, error: null, decoded: null });
  mark(study, "waiting");
  reading = reading.then(async () => {
    try {
      if (study.file.size > maxBytes) {
        const message = `got a file of ${size(study.file.size)} · expected at most ${size(maxBytes)} · is it a film?`;
        throw new server.Refusal(message);
      }
      await server.ready((why) => mark(study, "waiting", why));
      mark(study, "waiting", "reading");
      study.film = await server.film(study.file, study.settings);
      await thumbnail(study);
      mark(study, "ready");
    } catch (error) {
      Object.assign(study, { film: null, error });
      mark(study, "failed", "not read");
      say(`${study.file.name}: ${error.message}`);
    }
    if (shown === study) show(study);
  });
}

async function thumbnail({ film, picture }) {
  const bitmap = await createImageBitmap(new Blob([bytes(film.png)]));
  const side = Math.min(bitmap.width, bitmap.height);
  const [left, top] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
  picture.getContext("2d").drawImage(bitmap, left, top, side, side, 0, 0, picture.width, picture.height);
}

export function step(by) {
  const next = studies[studies.indexOf(shown) + by];
  if (!next) return;
  show(next);
  next.open.focus();
}

async function show(study) {
  shown = study;
  for (const { open } of studies) open.removeAttribute("aria-current");
  study?.open.setAttribute("aria-current", true);
  const settings = study?.settings ?? SETTINGS;
  for (const [name, value] of Object.entries(settings)) $(name)[typeof value === "boolean" ? "checked" : "value"] = value;
  $("drafts").replaceChildren(...(study?.drafts.map((draft) => draft.node) ?? []));
  tell(study);
  arrange();
  if (study?.film && !study.decoded) {
    for (const other of studies) other.decoded = null;
    study.decoded = await viewer.decode(bytes(study.film.png), study.view);
  }
  if (shown === study) viewer.show(study?.decoded);
}

/** What is known of the film beside its picture. */
function tell(study) {
  const { film, error } = study ?? {};
  const { format, grey_levels: levels, turned, view, view_source: source } = film?.film ?? {};
  const by = view && `${view} view by ${source}`;
  const known = film ? [format, `${film.width} × ${film.height} px`, by, levels && `${levels} grey levels`, turned, film.rendering] : [];
  $("film-facts").textContent = known.filter(Boolean).join(" · ");
  const remarks = film?.remarks ?? [];
  $("remarks").hidden = !remarks.length;
  $("remarks").querySelector("ul").replaceChildren(...remarks.map((remark) => el("li", {}, remark)));
  $("canvas").setAttribute("aria-label", `The film ${study?.file.name}`);
  const invitation = $("invitation");
  invitation.hidden = Boolean(study);
  const state = error ? failure(error.message, error.again && button("Try again", () => read(study))) : study && "Reading the film …";
  $("empty").replaceChildren(invitation, state ?? "");
}

/** What can be done now. */
function arrange() {
  const [busy, several] = [Boolean(shown?.controller), studies.length > 1];
  const focused = [$("draft"), $("stop")].includes(document.activeElement);
  $("draft").hidden = busy;
  $("stop").hidden = !busy;
  $("draft").disabled = !shown?.film;
  $("draft").textContent = shown?.drafts.length ? "Ask again" : "Draft findings";
  if (focused) $(busy ? "stop" : "draft").focus();
  $("same-reason").hidden = !several || !shown?.settings.reason;
  $("reason").disabled = Boolean(shown?.settings.query);
  $("all").hidden = !several;
  $("draft-all").textContent = all ? "Stop all" : "Draft all";
  $("draft-all").disabled = !all && !studies.some(pending);
  $("legend").hidden = !shown?.drafts.some((draft) => draft.result?.sentences);
  const calibrated = shown?.drafts.some((draft) => draft.result?.calibration);
  $("meaning").textContent = calibrated
    ? "How likely it is that nothing in a sentence is false: measured on other studies of the kind it was calibrated on."
    : "How sure the model was of its words; not how likely they are true.";
}

/** Draft one film; it raises nothing: what goes wrong is told where the text would be. */
async function draft(study) {
  const { reason, query, ...settings } = study.settings;
  const asked = { ...settings, ...(query ? { query } : { reason }), model: $("models").hidden ? "" : $("model").value, sr: study.film.film.format === "DICOM" };
  const made = new Draft(study.file.name, study.drafts.length + 1, asked);
  study.controller = new AbortController();
  study.drafts.unshift(made);
  if (shown === study) $("drafts").prepend(made.node);
  mark(study, "busy", "queued");
  const clock = setInterval(() => made.tick(), 1000);
  let kind = "done";
  try {
    for await (const [event, data] of server.findings(study.file, asked, study.controller.signal)) {
      if (event === "start") made.tick("Waiting for the first word");
      if (event === "piece") made.push(data.text);
      if (event === "piece" && study.status.textContent !== "writing") mark(study, "busy", "writing");
      if (event === "findings") made.done(data);
    }
    keep(made);
  } catch (error) {
    const stopped = error.name === "AbortError";
    kind = stopped ? "stopped" : "failed";
    const again = error.again && button("Try again", () => study.controller ?? draft(study));
    made.ended(stopped ? "Stopped." : error.message, again);
  }
  clearInterval(clock);
  study.controller = null;
  mark(study, kind);
}

async function draftAll() {
  if (all) {
    all.abort();
    return studies.forEach((study) => study.controller?.abort());
  }
  const { signal } = (all = new AbortController());
  const waiting = studies.filter(pending);
  const work = async () => {
    for (let study; !signal.aborted && (study = waiting.shift()); ) {
      if (studies.includes(study) && pending(study)) await draft(study);
    }
  };
  await Promise.all(Array.from({ length: $("together").checked ? MOST_AT_ONCE : 1 }, work));
  all = null;
  return arrange();
}

export function draftShown() {
  if (shown?.film && !shown.controller) draft(shown);
}

export const stop = () => shown?.controller?.abort();

export function listen() {
  for (const name of Object.keys(SETTINGS)) {
    $(name).addEventListener(RENDERS.includes(name) ? "change" : "input", ({ target }) => {
      if (!shown) return;
      shown.settings[name] = target.type === "checkbox" ? target.checked : target.value;
      if (RENDERS.includes(name)) {
        read(shown);
        show(shown);
      }
      arrange();
    });
  }
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draftShown();
  });
  $("stop").addEventListener("click", stop);
  $("empty").addEventListener("click", () => shown ?? $("files").click());
  $("draft-all").addEventListener("click", draftAll);
  $("same-reason").addEventListener("click", () => {
    for (const study of studies) study.settings.reason = shown.settings.reason;
    say("The reason now stands with every film.");
  });
}
