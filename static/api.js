// Talks to the service: sends requests, reads streams, and puts what goes wrong into words.
// All addresses are relative to the page, so that it works under a proxy's path.

import { parsed, store } from "./browser.js";

/** Tells the user what happened and what to do about it. */
export class Problem extends Error {
  /** The facts may be `said`, the service's own words; `waitSeconds`, after which to ask again;
   * `isGone`, if nothing answers; `isKey`, if the key is at fault; or `field`, if that is. */
  constructor(words, facts) {
    super(words);
    Object.assign(this, facts);
  }
}

export const gone = () => new Problem("The service does not answer: it was stopped, or the network is down.", {
  isGone: true,
});

/** Gives true if the user has stopped the request. */
export const isStop = (error) => error.name === "AbortError";

// This is for the `catch` of fetch and read alone. Elsewhere a TypeError is our own mistake.
export function lostConnection(error) {
  throw isStop(error) ? error : gone();
}

export const key = () => store.getItem("key");
export const keepKey = (text) => store.setItem("key", text);
export const dropKey = () => store.removeItem("key");
export const keyHeader = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

// For these errors, by code or by status, words are enough.
const WORDS = new Map([
  ["context_length_exceeded", "This is too long for the model. Shorten the prompt, or ask for less length."],
  ["model_not_found", "This model is no longer served. Reload the page to see which are."],
  [413, "The prompt is too large to send. Shorten it."],
  [504, "This took longer than allowed. Ask for less length."],
]);

/** Retry-After is either a number of seconds or a date. */
function retryAfterSeconds(response) {
  const header = response.headers.get("Retry-After") ?? "";
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return seconds > 0 ? Math.ceil(seconds) : 1;
}

async function busyOrStopping() {
  // A full queue and a stop both answer 503. Only /ready tells them apart.
  const ready = await fetch("ready").then((answer) => answer.json()).catch(() => ({}));
  return ready.status === "draining"
    ? "The service is stopping and takes no new work."
    : "The service is busy: too many requests are waiting.";
}

export async function problemOf(response) {
  const { error, detail } = await response.json().catch(() => null) ?? {};
  const { status } = response;
  // The service explains itself. Without a word, this is from a proxy in front of it.
  if (status >= 500 && !error && !detail) return gone();
  if (error?.code === "content_filter") {
    return new Problem("The prompt has a word that is not allowed here. Change it and try again.");
  }
  const first = Array.isArray(detail) ? detail[0] : null;
  const said = error?.message ?? (first ? `${first.loc?.at(-1) ?? "It"}: ${first.msg}` : String(detail ?? ""));
  const words = WORDS.get(error?.code) ?? WORDS.get(status);
  if (words) return new Problem(words, { said });
  if (status === 401) {
    const lack = key() ? "The service does not know this API key." : "This service needs an API key.";
    return new Problem(`${lack} Enter yours in the field.`, { isKey: true });
  }
  const waitSeconds = retryAfterSeconds(response);
  if (status === 429) return new Problem("You have reached your limit for this minute.", { said, waitSeconds });
  if (status === 503) return new Problem(await busyOrStopping(), { waitSeconds });
  if (status >= 500) {
    const id = response.headers.get("X-Request-ID") ?? "unknown";
    return new Problem("The service failed. Try again; if it fails again, tell whoever runs it.", {
      said: `${said || `Status ${status}`}, request ${id}`,
    });
  }
  return new Problem("The service did not accept this.", { said: said || `Status ${status}` });
}

export const isHealthy = () => fetch("health").then((answer) => answer.ok).catch(() => false);

/** Gives the response, or null if there is none. */
export const getMetrics = () => fetch("metrics", { headers: keyHeader() }).catch(() => null);

/** Asks which fields the service takes and which models it has. */
export async function describe() {
  const get = async (path) => {
    const response = await fetch(path, { headers: keyHeader() }).catch(lostConnection);
    if (!response.ok) throw await problemOf(response);
    return response.json().catch(() => { throw gone(); });
  };
  const [{ components }, { data }] = await Promise.all([get("openapi.json"), get("v1/models")]);
  return { schemas: components.schemas, modelNames: data.map(({ id }) => id) };
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(lostConnection);
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) { // Some begin with a name.
        const data = block.split("\n").find((line) => line.startsWith("data: "));
        if (data) yield data.slice(6);
      }
    }
  } finally { // When we stop reading, the service stops generating.
    reader.cancel().catch(() => {});
  }
}

/** Asks for a completion and gives its chunks as they stream in. */
export async function* complete(body, signal) {
  const response = await fetch("v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...keyHeader() },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  }).catch(lostConnection);
  if (!response.ok) throw await problemOf(response);
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk?.error) {
      throw new Problem("The text broke off here. Generate again, or ask for less length.", {
        said: chunk.error.message,
      });
    }
    if (!chunk?.choices || !chunk.usage) {
      throw new Problem("The answer came garbled: something on its way changed it. Generate again.");
    }
    yield chunk;
  }
  throw gone();
}
