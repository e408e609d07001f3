/** What is asked of the server, and what it answers. Paths are relative: the page works behind a prefix, too. */

const NO_KEY = "got no key that the server knows · expected one · reload the page and enter it as the password";

/** An answer that is not what was asked for. `again` says that the same may work later. */
export class Refusal extends Error {
  constructor(message, { status = 0, again = false } = {}) {
    super(message);
    Object.assign(this, { status, again });
  }
}

function unreachable() {
  const message = `got no answer from the server · expected one from ${location.host} · see whether it runs, then try again`;
  return new Refusal(message, { again: true });
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (response.ok) return response;
  const { status } = response;
  const said = (await response.json().catch(() => null))?.error?.message.replace(/^[0-9a-f]{24}: /, "");
  const unnamed = `got status ${status} from the server · expected an answer · see what it has logged`;
  throw new Refusal(status === 401 ? NO_KEY : (said ?? unnamed), { status, again: status === 429 || status === 503 });
}

export const about = async () => (await ask("about")).json();

/** Wait until the model is loaded; `tell` is told each time that it is not. */
export async function ready(tell) {
  for (;;) {
    try {
      return await ask("health");
    } catch (error) {
      if (!error.again) throw error;
      tell(error.status ? "the model is loading" : "the server does not answer");
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function form(file, fields) {
  const made = new FormData();
  made.append("film", file, file.name);
  for (const [name, value] of Object.entries(fields)) if (value) made.append(name, value);
  return made;
}

/** The film as the model's rules render it. */
export async function film(file, { any_film, rendering }) {
  return (await ask("films", { method: "POST", body: form(file, { any_film, rendering }) })).json();
}

/** Yield [event, data] of a draft as they come. The last is "findings", or this raises. */
export async function* findings(file, fields, signal) {
  const headers = { Accept: "text/event-stream" };
  const response = await ask("findings", { method: "POST", body: form(file, fields), headers, signal });
  for await (const [event, data] of events(response.body)) {
    if (event === "error") throw new Refusal((data.error ?? data).message);
    yield [event, data];
    if (event === "findings") return;
  }
  throw new Refusal("got half an answer · expected all of it · try again", { again: true });
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r\n\r\n|\n\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = [...block.matchAll(/^(event|data): ?(.*?)\r?$/gm)];
        const [event, data] = ["event", "data"].map((name) => fields.find((field) => field[1] === name)?.[2]);
        if (data) yield [event, JSON.parse(data)];
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? unreachable() : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
