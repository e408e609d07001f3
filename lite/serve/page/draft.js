/** One draft of a film: its text as it comes, then how sure the model was of it, what it took and what made it. */

import { button, bytes, download, el, facts, failure, quiet, say, seconds, size } from "./dom.js";

const STEPS = [0.6, 0.75, 0.9]; // of the shading: the legend's
const NOTICE = "Research draft, not for clinical use.";
const STAGES = { queued_s: "queue", image_s: "film", vision_s: "tower", prefill_s: "prompt", decode_s: "decode" };

export class Draft {
  constructor(name, number, asked) {
    Object.assign(this, { name, asked, text: "", result: null, doing: "Sent to the server", begun: performance.now() });
    this.said = 0; // characters that a listener has heard
    this.paragraph = el("p", { class: "text" });
    this.status = quiet();
    this.rest = el("div");
    const header = el("header", {}, el("h3", {}, `Draft ${number}`), el("p", {}, this.told));
    const label = `Draft ${number} of ${name}`;
    this.node = el("article", { class: "draft busy", "aria-label": label }, header, this.paragraph, this.status, this.rest);
    this.tick();
  }

  get question() {
    return this.asked.query || this.asked.reason;
  }

  /** What was asked, and of which model where there are several. */
  get told() {
    return [this.asked.model, this.question || "without a reason"].filter(Boolean).join(" · ");
  }

  /** Say what goes on, and for how long: on a slow machine the first word takes most of it. */
  tick(doing = this.doing) {
    this.doing = doing;
    this.status.textContent = `${doing}, ${seconds((performance.now() - this.begun) / 1e3)} …`;
  }

  push(piece) {
    this.text += piece;
    this.paragraph.textContent = this.text;
    this.tick("Writing");
    const end = this.text.lastIndexOf(". ") + 1;
    if (end > this.said) {
      say(this.text.slice(this.said, end));
      this.said = end;
    }
  }

  /** End it without findings; what has been written stays to be read. */
  ended(message, action) {
    this.node.classList.remove("busy");
    this.status.textContent = this.text ? "Not a whole draft." : "";
    this.rest.replaceChildren(failure(message, action));
    say(message);
  }

  done(result) {
    Object.assign(this, { result, text: result.prediction });
    this.node.classList.remove("busy");
    this.paragraph.replaceChildren(...sentences(result));
    this.status.textContent = told(result);
    const list = el("dl", { class: "facts" }, ...facts([...times(result), ...provenance(result)]));
    const more = el("details", {}, el("summary", {}, "Timings and provenance"), bar(result.timings), list);
    this.rest.replaceChildren(...notes(result), this.actions(), more);
    say(`${this.text.slice(this.said)} The draft is done.`);
  }

  actions() {
    const { sr, ...result } = this.result;
    const name = `${this.name.replace(/\.(png|jpe?g|dcm|dicom)$/i, "")}.findings`;
    return el(
      "p",
      { class: "row" },
      button("Copy", (event) => this.copy(event.target)),
      button("JSON", () => download(`${name}.json`, `${JSON.stringify(result, null, 1)}\n`, "application/json")),
      button("Text", () => download(`${name}.txt`, this.asText(), "text/plain")),
      sr && button("DICOM SR", () => download(`${name}.dcm`, bytes(sr), "application/dicom")),
    );
  }

  /** Copy the text and the short notice. Without HTTPS or loopback a browser has no clipboard: then it is selected. */
  async copy(pressed = this.rest.querySelector("button")) {
    try {
      await navigator.clipboard.writeText(`${this.text}\n\n${NOTICE}\n`);
      pressed.textContent = "Copied";
      say("Copied.");
      setTimeout(() => (pressed.textContent = "Copy"), 2000);
    } catch {
      getSelection().selectAllChildren(this.paragraph);
      pressed.textContent = "Selected: Ctrl C";
      say("This browser does not let the page copy. The text is selected: copy it with Ctrl and C.");
    }
  }

  asText() {
    const { result, asked } = this;
    const question = asked.query ? `Question: ${asked.query}` : `Reason for the exam: ${asked.reason || "none given"}`;
    const adapter = result.adapter ? `, adapter ${result.adapter}` : "";
    const made = `Artifact ${result.artifact_id}${adapter}, ${result.engine} on ${result.device}`;
    return [`Film: ${this.name}`, question, "", this.text, "", made, NOTICE, ""].join("\n");
  }
}

function sentences({ prediction, sentences: scored, calibration }) {
  if (!scored) return [prediction];
  return scored.map(({ text, mean_probability: mean, probability }) => {
    const words = text.trimEnd();
    const sure = calibration ? probability : mean; // calibrated: that nothing in it is false
    const share = sure !== null && el("small", { class: "share" }, `\u00a0${Math.floor(100 * sure)}\u00a0%`);
    const step = STEPS.filter((least) => (sure ?? 1) >= least).length;
    const shaded = el("span", { class: `sure-${step}` }, words, share);
    return el("span", { class: "sentence" }, shaded, text.slice(words.length));
  });
}

function told({ prediction, timings }) {
  const words = prediction.split(/\s+/).filter(Boolean).length;
  const [first, last] = [timings.ttft_s, timings.total_s].map((time) => seconds(timings.queued_s + time));
  const pace = timings.decode_s && Math.round((60 * words) / timings.decode_s).toLocaleString("en");
  return `First word after ${first}, all ${words} after ${last}${pace ? `: ${pace} words a minute` : ""}.`;
}

function notes({ finish_reason, num_reused_tokens: reused, num_prompt_tokens: all }) {
  const cut = finish_reason === "length" && failure("Cut at the longest text · it may go on");
  const taken = `The film was taken up where a row still held it: ${reused} of ${all} places of the prompt were not computed again.`;
  return [cut, reused > 0 && quiet(taken)].filter(Boolean);
}

function bar(timings) {
  const parts = Object.entries(STAGES).map(([name, stage]) => {
    const part = el("i", { class: stage });
    part.style.flexGrow = 1e6 * timings[name];
    return part;
  });
  return el("div", { class: "bar", "aria-hidden": "true" }, ...parts);
}

function times({ timings, num_accepted_tokens: accepted, num_drafted_tokens: drafted }) {
  const steps = timings.decode_steps_s.length;
  const each = steps ? ` for ${steps} further tokens, ${seconds(timings.decode_s / steps)} each` : "";
  const stage = (name) => seconds(timings[name]);
  return [
    ["Queue", stage("queued_s")],
    ["Film", stage("image_s")],
    ["Vision tower", timings.vision_s ? stage("vision_s") : "not needed"],
    ["Prompt", stage("prefill_s")],
    ["Text", `${stage("decode_s")}${each}`],
    ["Beside it", timings.batch_size > 1 ? `up to ${timings.batch_size} studies at a time` : "nothing else"],
    ["Guessed ahead", drafted > 0 && `${accepted} of ${drafted} tokens were right`],
  ];
}

function provenance(result) {
  const { engine, backend, device, dtype, cache_dtype: cache, image_method: method, memory } = result;
  return [
    ["Artifact", el("code", {}, result.artifact_id)],
    ["Adapter", result.adapter],
    ["Decoder", `${engine} (${backend}) on ${device}, ${dtype}, cache ${cache}`],
    ["Tower", result.provider],
    ["Film rendered", result.rendering],
    ["Image tokens", `${result.num_image_tokens}${method ? ` (${method})` : ""}`],
    ["Memory, peak", memory.decode.rss_bytes && size(memory.decode.rss_bytes)],
    ["Fallbacks", result.fallbacks.length ? result.fallbacks : "none"],
  ];
}
