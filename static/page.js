// The page: reads its form, asks POST /v1/completions, shows what comes back.
//
// Whatever comes from a prompt, a model or a link is put in as a text node or an attribute
// of the page's own; nothing in here parses HTML. All addresses are relative, so that the
// page works under a proxy's path.

const $ = (id) => document.getElementById(id);

/** A new element; content: texts and elements. */
function make(tag, attributes, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...content);
  return element;
}

function button(words, act) {
  const made = make("button", { type: "button", class: "plain" }, words);
  made.addEventListener("click", () => act(made));
  return made;
}

/** Session storage, or where the browser forbids it, what lasts until the page is left. */
const store = (() => {
  const memory = new Map();
  try {
    return sessionStorage;
  } catch {
    return {
      getItem: (name) => memory.get(name) ?? null,
      setItem: (name, text) => memory.set(name, text),
      removeItem: (name) => memory.delete(name),
    };
  }
})();

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Has a screen reader say it. Again, too, if it is what was said last. */
function say(words) {
  $("announcer").textContent = "";
  $("announcer").textContent = words;
}

// --- What can go wrong, in words ----------------------------------------------------------------

/** What the user is told: what happened and what to do. */
class Problem extends Error {
  /** waitSeconds: after which to ask again; isGone: nothing answers; isKey: it lacks a
   * key; field: the one at fault. */
  constructor(words, { said = "", waitSeconds = null, isGone = false, isKey = false, field = null } = {}) {
    super(words);
    Object.assign(this, { said, waitSeconds, isGone, isKey, field });
  }
}

const GONE = "The service does not answer: it was stopped, or the network is down.";
const isStop = (error) => error.name === "AbortError";

/** For the `catch` of fetch and read alone: elsewhere a TypeError is a mistake in this file. */
function lostConnection(error) {
  if (isStop(error)) throw error;
  throw new Problem(GONE, { isGone: true });
}

/** Seconds that a refusal asks to wait; Retry-After is a number of them, or a date. */
function retryAfterSeconds(response) {
  const header = response.headers.get("Retry-After") ?? "";
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return seconds > 0 ? Math.ceil(seconds) : 1;
}

async function problemOf(response) {
  const { error, detail } = await response.json().catch(() => null) ?? {};
  const { status } = response;
  // What stands before the service says so in words of its own.
  if (status >= 500 && !error && !detail) return new Problem(GONE, { isGone: true });
  const first = Array.isArray(detail) ? detail[0] : null;
  const said = error?.message ?? (first ? `${first.loc?.at(-1) ?? "It"}: ${first.msg}` : String(detail ?? ""));
  if (error?.code === "content_filter") {
    return new Problem("The prompt has a word that is not allowed here. Change it and try again.");
  }
  if (error?.code === "context_length_exceeded") {
    return new Problem("This is too long for the model. Shorten the prompt, or ask for less length.", { said });
  }
  if (error?.code === "model_not_found") {
    return new Problem("This model is no longer served. Reload the page to see which are.", { said });
  }
  if (status === 401) {
    askForKey();
    const words = key() ? "The service does not know this API key." : "This service needs an API key.";
    return new Problem(`${words} Enter yours in the field.`, { isKey: true });
  }
  if (status === 413) return new Problem("The prompt is too large to send. Shorten it.", { said });
  if (status === 429) {
    const waitSeconds = retryAfterSeconds(response);
    return new Problem("You have reached your limit for this minute.", { said, waitSeconds });
  }
  if (status === 503) {
    const waitSeconds = retryAfterSeconds(response);
    // A full queue and a stop look the same but for /ready.
    const ready = await fetch("ready").then((answer) => answer.json()).catch(() => ({}));
    const words = ready.status === "draining"
      ? "The service is stopping and takes no new work."
      : "The service is busy: too many requests are waiting.";
    return new Problem(words, { waitSeconds });
  }
  if (status === 504) return new Problem("This took longer than allowed. Ask for less length.", { said });
  if (status >= 500) {
    const id = response.headers.get("X-Request-ID") ?? "unknown";
    return new Problem("The service failed. Try again; if it fails again, tell whoever runs it.", {
      said: `${said || `Status ${status}`}, request ${id}`,
    });
  }
  return new Problem("The service did not accept this.", { said: said || `Status ${status}` });
}

/** Puts a problem in words into `notice`; further: elements after them. */
function tell(notice, problem, ...further) {
  notice.replaceChildren(make("p", {}, problem.message));
  if (problem.said) notice.append(make("small", {}, problem.said));
  notice.append(...further);
  say(problem.message);
}

/** Tells of `problem` and, once it may be over, resolves to true; false: the user said no. */
async function waitToRetry(notice, problem, signal) {
  if (problem.isGone) {
    tell(notice, problem, make("p", {}, "Waiting for it to come back …"));
    for (;;) {
      await sleep(1000);
      // Until something else is shown in its place.
      if (!notice.isConnected || notice.firstChild?.textContent !== problem.message) return false;
      if (await fetch("health").then((answer) => answer.ok).catch(() => false)) break;
    }
    tell(notice, new Problem("The service is back. Generate again."));
    return true;
  }
  const left = make("span", {});
  let cancel;
  const keepFocus = () => { // it would be lost with the button
    if (document.activeElement === cancel) document.querySelector("button.main").focus();
  };
  const isCancelled = new Promise((resolve) => {
    const end = () => {
      keepFocus();
      resolve(true);
    };
    cancel = button("Cancel", end);
    signal?.addEventListener("abort", end);
    tell(notice, problem, make("div", { class: "row" }, left, cancel));
  });
  for (let seconds = problem.waitSeconds; seconds > 0; seconds -= 1) {
    left.textContent = `Trying again in ${seconds} s.`;
    if (await Promise.race([isCancelled, sleep(1000)])) return false;
  }
  keepFocus();
  return true;
}

// --- The key, if one is needed ------------------------------------------------------------------

const key = () => store.getItem("key");
const keyHeader = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

function showKeyField() {
  $("key-field").hidden = false;
  $("forget-key").hidden = !key();
  $("key").placeholder = key() ? "a key is set" : "";
}

function askForKey() {
  showKeyField();
  $("key").focus();
}

async function useKey() {
  const typed = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(typed)) { // what a header can hold
    return tell($("problem"), new Problem("A key has letters, digits and signs, and no space within."));
  }
  store.setItem("key", typed);
  $("key").value = "";
  showKeyField();
  $("prompt").focus();
  if (!await start()) return;
  const words = "The key is accepted.";
  if (refused && refused === shown) perform(refused, `${words} Generating.`); // its notice goes, too
  else say(words);
}

function forgetKey() {
  store.removeItem("key");
  askForKey();
  say("The key is forgotten.");
}

// --- The form: its ranges come from the service -------------------------------------------------

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "n", "seed"];
let ranges = null; // of every field, once they are known
let firstValues = null; // of the numbers, likewise
let modelNames = [];
let numStops = 0;
let numLogprobs = 0;

function rangeOf(schema) {
  const of = schema.anyOf?.find((each) => each.type !== "null") ?? schema;
  return {
    isWhole: of.type === "integer",
    min: of.minimum ?? of.exclusiveMinimum,
    hasMin: of.minimum !== undefined,
    // Beyond that, JavaScript's numbers are not exact.
    max: Math.min(of.maximum ?? Infinity, Number.MAX_SAFE_INTEGER),
  };
}

/** Asks the service what it takes and which models it serves, and sets up the form. */
async function load() {
  const get = async (path) => {
    const response = await fetch(path, { headers: keyHeader() }).catch(lostConnection);
    // /ready has the models' names also when it says no.
    if (!response.ok && path !== "ready") throw await problemOf(response);
    return response.json().catch(() => { throw new Problem(GONE, { isGone: true }); });
  };
  const [{ components }, { model_names }] = await Promise.all([get("openapi.json"), get("ready")]);
  const asked = components.schemas.CompletionRequest.properties;
  // The native route's first values suit a reader better, and its length has an upper end.
  const native = components.schemas.GenerateRequest.properties;
  const isFirst = !ranges; // later, with another key, the form keeps what is in it
  const chosen = modelBoxes().filter((box) => box.checked).map((box) => box.value);
  ranges = Object.fromEntries(NUMBERS.map((name) => [name, rangeOf(asked[name])]));
  ranges.max_tokens = rangeOf(native.max_new_tokens);
  numStops = asked.stop.anyOf.find((each) => each.type === "array").maxItems;
  numLogprobs = rangeOf(asked.logprobs).max;
  modelNames = model_names;
  firstValues = {
    max_tokens: native.max_length.default, temperature: native.temperature.default,
    top_p: native.top_p.default, top_k: native.top_k.default, n: asked.n.default,
  };
  for (const name of NUMBERS) {
    const { isWhole, hasMin, min, max } = ranges[name];
    const step = isWhole ? 1 : 0.05;
    const bounds = { min: hasMin ? min : min + step, max, step };
    Object.assign($(name), bounds);
    const slider = document.querySelector(`[data-of=${name}]`);
    if (slider) Object.assign(slider, bounds);
  }
  $("models").lastElementChild.replaceChildren(...modelNames.map((name) => {
    const box = make("input", { type: "checkbox", name: "model", value: name });
    box.checked = chosen.includes(name);
    return make("label", { class: "check" }, box, name);
  }));
  $("models").hidden = modelNames.length < 2;
  $("params").disabled = false;
  if (!isFirst) return;
  setFirstValues();
  readAddress();
}

/** Every field but the prompt as it is at first. */
function setFirstValues() {
  for (const name of NUMBERS) setNumber(name, firstValues[name] ?? "");
  $("stop_strings").value = "";
  $("logprobs").checked = false;
  modelBoxes().forEach((box, index) => { box.checked = index === 0; });
}

function setNumber(name, value) {
  $(name).value = value;
  $(name).removeAttribute("aria-invalid");
  const slider = document.querySelector(`[data-of=${name}]`);
  if (slider) slider.value = value;
}

/** The number in a field; null if it is empty. Throws Problem if it is out of its range. */
function readNumber(name) {
  const field = $(name);
  const { isWhole, hasMin, min, max } = ranges[name];
  if (name === "seed" && field.value === "" && !field.validity.badInput) return null;
  const value = field.value === "" ? NaN : Number(field.value);
  const isRight = (hasMin ? value >= min : value > min) && value <= max
    && (!isWhole || Number.isInteger(value));
  if (isRight) return value;
  const label = field.labels[0].firstChild.textContent.trim();
  const kind = isWhole ? "a whole number" : "a number";
  const from = hasMin ? `from ${min}` : `above ${min}`;
  throw new Problem(`${label} takes ${kind} ${from} up to ${max}.`, { field });
}

const written = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
const meant = (line) => line.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]);

function readStops() {
  const stops = $("stop_strings").value.split("\n").filter((line) => line).map(meant);
  if (stops.length > numStops) {
    throw new Problem(`At most ${numStops} strings to stop before.`, { field: $("stop_strings") });
  }
  return stops;
}

const modelBoxes = () => [...$("models").querySelectorAll("input")];

/** The request that the form describes; its seed is null where a new one is to be drawn. */
function readForm() {
  const fields = { prompt: $("prompt").value };
  if (!fields.prompt) throw new Problem("Write how the text begins.", { field: $("prompt") });
  for (const name of NUMBERS) fields[name] = readNumber(name);
  const stops = readStops();
  if (stops.length) fields.stop = stops;
  const models = modelBoxes().filter((box) => box.checked).map((box) => box.value);
  if (!models.length) throw new Problem("Choose a model.", { field: modelBoxes()[0] });
  return { fields, models };
}

function fillForm({ fields, models }) {
  $("prompt").value = fields.prompt;
  for (const name of NUMBERS) setNumber(name, fields[name] ?? "");
  $("stop_strings").value = (fields.stop ?? []).map(written).join("\n");
  for (const box of modelBoxes()) box.checked = models.includes(box.value);
}

const drawSeed = () => Math.floor(Math.random() * 1e9); // short enough to be read out

// --- The address: after the #, so that it stays out of every server's log -----------------------

function linkTo({ fields, models, logprobs }) {
  const link = new URLSearchParams();
  for (const [name, value] of Object.entries(fields)) {
    for (const each of [value].flat()) if (each !== null) link.append(name, each);
  }
  if (modelNames.length > 1) for (const model of models) link.append("model", model);
  if (logprobs) link.append("logprobs", numLogprobs);
  return `#${link}`;
}

let addressTimer;

/** Longer addresses get lost on their way from one program to another. */
const MAX_LINK = 32_000;

function writeAddress(asked) {
  clearTimeout(addressTimer); // a change of the form from before would overwrite this
  const { prompt, ...others } = asked.fields;
  const links = [linkTo(asked), linkTo({ ...asked, fields: others }), "#"];
  history.replaceState(null, "", links.find((link) => link.length <= MAX_LINK));
}

/** Fills the form from a link. What is no value for a field is left out, what is out of its
 * range is brought into it. */
function readAddress() {
  const link = new URLSearchParams(location.hash.slice(1));
  for (const name of NUMBERS) {
    const { isWhole, hasMin, min, max } = ranges[name];
    let value = Number(link.get(name) || NaN);
    if (!Number.isFinite(value)) continue;
    value = Math.min(Math.max(isWhole ? Math.trunc(value) : value, min), max);
    if (hasMin || value > min) setNumber(name, value);
  }
  const stops = link.getAll("stop").filter((each) => each).slice(0, numStops);
  if (stops.length) $("stop_strings").value = stops.map(written).join("\n");
  const models = link.getAll("model").filter((name) => modelNames.includes(name));
  if (models.length) for (const box of modelBoxes()) box.checked = models.includes(box.value);
  if (link.has("logprobs")) $("logprobs").checked = true;
}

function readPrompt() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (link.has("prompt")) $("prompt").value = link.get("prompt");
}

/** Another link in the same tab: nothing of the form from before is mixed into it. */
function readNewAddress() {
  clearTimeout(addressTimer);
  $("prompt").value = "";
  readPrompt();
  if (!ranges) return;
  setFirstValues();
  readAddress();
}

function formChanged() {
  clearTimeout(addressTimer); // browsers allow some hundred changes in half a minute
  addressTimer = setTimeout(() => {
    if (!ranges) return;
    try {
      writeAddress({ ...readForm(), logprobs: $("logprobs").checked });
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem; // a form half filled in has no link
    }
  }, 500);
}

// --- Asking -------------------------------------------------------------------------------------

// A run is what one press of the button asked for, and what came of it, as plain JSON:
// {fields, models, logprobs, answers: [{model, choices: [{text, end, tokens}], figures}]}.
// Of one model's answer, `tokens` are null unless the token view asked for them.

let shown = null; // the run on display
let view = null; // its panes
let refused = null; // the run that lacked a key
let stopper = null; // AbortController of what is under way

/** The body of a request, which the page sends as a stream. */
function bodyOf(run, model) {
  return { model, ...run.fields, ...(run.logprobs && { logprobs: numLogprobs }) };
}

/** The `data` of the events of a stream. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(lostConnection);
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
    }
  } finally { // whoever stops reading lets the service stop, too
    reader.cancel().catch(() => {});
  }
}

/** What JSON text means; null if it is none. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** The chunks of one model's answer. Throws Problem. */
async function* chunks(run, model, signal) {
  const response = await fetch("v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...keyHeader() },
    body: JSON.stringify({
      ...bodyOf(run, model),
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
  throw new Problem(GONE, { isGone: true });
}

/** One model's answer, from the first event to the end of the stream. Throws Problem. */
async function receive(run, answer, pane, signal) {
  const started = performance.now();
  let figures = null;
  let firstTokens = 0;
  for await (const { model, choices, usage } of chunks(run, answer.model, signal)) {
    const ms = performance.now() - started;
    if (!figures) { // what a former attempt has left goes only now
      figures = { tokens: 0, firstMs: ms, perSecond: 0 };
      firstTokens = usage.completion_tokens;
      Object.assign(answer, { name: model, figures, choices: emptyChoices(run) });
      pane.clear();
    }
    for (const { index, text, finish_reason, logprobs } of choices) {
      const choice = answer.choices[index];
      choice.text += text;
      choice.end = finish_reason ?? choice.end;
      for (const [at, token] of (logprobs?.tokens ?? []).entries()) {
        choice.tokens.push([token, logprobs.token_logprobs[at], logprobs.top_logprobs[at]]);
      }
      pane.grow(index, text);
    }
    figures.tokens = usage.completion_tokens;
    const since = (ms - figures.firstMs) / 1000;
    if (since > 0 && choices.length) figures.perSecond = (figures.tokens - firstTokens) / since;
    pane.showFigures();
  }
}

function emptyChoices(run) {
  return Array.from({ length: run.fields.n }, () => ({
    text: "", end: null, tokens: run.logprobs ? [] : null,
  }));
}

/** Has one model answer, again where it is refused for a while, and shows what happens. */
async function answerWith(run, answer, pane, signal) {
  for (let attempt = 0; ; attempt += 1) {
    pane.setRunning(true);
    try {
      await receive(run, answer, pane, signal);
      return;
    } catch (problem) {
      const isEnded = isStop(problem) || answer.figures;
      if (isEnded) for (const choice of answer.choices) choice.end ??= isStop(problem) ? "stopped" : "broken";
      if (isStop(problem)) return;
      if (!(problem instanceof Problem)) throw problem;
      pane.setRunning(false);
      if (problem.isKey) refused = run;
      if (problem.waitSeconds) {
        problem.waitSeconds = Math.max(problem.waitSeconds, Math.min(2 ** attempt, 30));
        if (await waitToRetry(pane.notice, problem, signal)) {
          pane.notice.replaceChildren();
          continue;
        }
        if (pane.notice.isConnected) tell(pane.notice, new Problem("Cancelled. Generate tries again."));
        return;
      }
      if (problem.isGone) waitToRetry(pane.notice, problem); // and does not retry: text is there
      else tell(pane.notice, problem);
      return;
    } finally {
      pane.setRunning(false);
    }
  }
}

/** Asks every model of the run at once; a run that is under way is stopped. */
async function perform(run, words = "Generating.") {
  stop();
  refused = null;
  const mine = stopper = new AbortController();
  $("stop").removeAttribute("aria-disabled");
  show(run);
  writeAddress(run);
  say(words);
  const { signal } = mine;
  try {
    await Promise.all(run.answers.map((answer, at) => answerWith(run, answer, view[at], signal)));
  } finally { // whatever happened, nothing is left to stop
    if (mine === stopper) setIdle();
  }
  if (run.answers.some(({ figures }) => figures)) remember(run);
  if (signal.aborted) return; // stopped, or another run has taken over
  // One problem alone has been told already; beside other texts it is told with them.
  const isFine = (pane) => !pane.notice.hasChildNodes();
  if (!view.some(isFine)) return;
  say(view.map((pane) => (isFine(pane)
    ? pane.summary()
    : `${pane.name.textContent}: ${pane.notice.firstChild.textContent}`)).join(" "));
}

function setIdle() {
  stopper = null;
  $("stop").setAttribute("aria-disabled", "true");
}

function stop() {
  stopper?.abort();
  setIdle();
}

async function generate() {
  try {
    if (!ranges) await load();
    const { fields, models } = readForm();
    fields.seed ??= drawSeed();
    $("problem").replaceChildren();
    const run = { fields, models, logprobs: $("logprobs").checked };
    run.answers = models.map((model) => ({ model, choices: emptyChoices(run), figures: null }));
    await perform(run);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    tell($("problem"), problem);
    problem.field?.setAttribute("aria-invalid", "true");
    problem.field?.focus();
  }
}

// --- The result ---------------------------------------------------------------------------------

/** Why a text ended, in words. */
function endOf(run, choice) {
  return {
    length: `reached the length of ${run.fields.max_tokens} tokens`,
    stop: run.fields.stop ? "ended by the model, or before a stop string" : "ended by the model",
    content_filter: "ended by the word filter",
    stopped: "stopped",
    broken: "broken off",
  }[choice.end] ?? "";
}

/** One model's answer on the page. */
class Pane {
  constructor(run, answer) {
    Object.assign(this, { run, answer, isRunning: false });
    this.name = make("h3", {}, answer.name ?? answer.model);
    this.figures = make("p", { class: "figures" });
    this.notice = make("div", { class: "notice" });
    this.choices = make("div", {});
    const copies = make("div", { class: "row" },
      button("Copy as curl", (by) => copy(by, asCurl(bodyOf(run, answer.model)))),
      button("Copy as Python", (by) => copy(by, asPython(bodyOf(run, answer.model)))));
    this.element = make("article", { class: "pane", "aria-label": answer.model, "aria-busy": false },
      make("header", {}, this.name, this.figures), this.choices, this.notice, copies);
    this.clear();
    this.showFigures();
  }

  /** Draws the choices anew. */
  clear() {
    const { run, answer } = this;
    const { choices } = answer;
    this.name.textContent = answer.name ?? answer.model;
    // Of a long prompt its end is enough to see what a text goes on from.
    const { prompt } = run.fields;
    const most = choices.length * run.models.length > 1 ? 100 : 2000;
    const given = prompt.length > most ? `…${[...prompt.slice(-most)].slice(1).join("")}` : prompt;
    this.drawn = choices.map((choice, at) => {
      const text = make("p", { class: "text" }, make("span", { class: "given" }, given));
      const made = new Text();
      const end = make("span", {});
      const copier = button("Copy", (by) => copy(by, prompt + choice.text));
      copier.setAttribute("aria-label", `Copy text ${at + 1} of ${answer.model}`);
      const element = make("div", { class: "choice" }, text, make("div", { class: "end" }, end, copier));
      const tokens = run.logprobs && choice.tokens ? new TokenView(element, at) : null;
      text.append(tokens?.element ?? made);
      copier.hidden = true; // until there is some text
      return { choice, element, text, made, end, copier, tokens };
    });
    this.choices.replaceChildren(...this.drawn.map(({ element }) => element));
    this.drawn.forEach((_, index) => this.grow(index, this.drawn[index].choice.text));
    this.showEnds();
  }

  /** Shows what has been added to a choice. */
  grow(index, text) {
    const { choice, made, copier, tokens } = this.drawn[index];
    copier.hidden = !choice.text;
    if (tokens) tokens.show(choice, Boolean(choice.end) || !this.isRunning);
    else made.appendData(text);
    if (choice.end) this.showEnds();
  }

  setRunning(isRunning) {
    this.isRunning = isRunning;
    this.element.setAttribute("aria-busy", isRunning);
    if (!isRunning) this.drawn.forEach((_, index) => this.grow(index, ""));
    this.showEnds();
  }

  showEnds() {
    for (const { choice, text, end } of this.drawn) {
      text.querySelector(".caret")?.remove();
      if (this.isRunning && !choice.end) {
        text.append(make("span", { class: "caret", "aria-hidden": "true" }));
      }
      end.textContent = endOf(this.run, choice);
    }
  }

  showFigures() {
    const { figures } = this.answer;
    this.figures.textContent = figures ? [
      `${figures.tokens} ${figures.tokens === 1 ? "token" : "tokens"}`,
      `${figures.perSecond ? Math.round(figures.perSecond) : "–"} tokens/s`,
      `first token after ${Math.round(figures.firstMs)} ms`,
    ].join(" · ") : "";
  }

  /** The end in a sentence, for those who do not see it. */
  summary() {
    const { run, answer } = this;
    const ends = new Set(answer.choices.map((choice) => endOf(run, choice)));
    return `${answer.name ?? answer.model}: ${answer.figures?.tokens ?? 0} tokens, ${[...ends].join("; ")}.`;
  }
}

/** Puts a run on display. */
function show(run) {
  shown = run;
  view = run.answers.map((answer) => new Pane(run, answer));
  const head = make("div", { class: "row" },
    make("h2", {}, `Result, seed ${run.fields.seed}`),
    button("Keep seed", () => {
      setNumber("seed", run.fields.seed);
      formChanged();
      say("The seed is kept.");
    }),
    button("Copy link", (by) => copy(by, new URL(linkTo(run), location.href).href)));
  const panes = make("div", { class: "panes" }, ...view.map((pane) => pane.element));
  $("result").replaceChildren(head, ...(run.logprobs ? [legend()] : []), panes);
}

// --- Token view ---------------------------------------------------------------------------------

// The lower end of each class of probability; the classes differ in colour and in their line.
const STEPS = [0.5, 0.2, 0.05, 0.01, 0];
const classOf = (probability) => `p${STEPS.findIndex((least) => probability >= least)}`;

function legend() {
  const words = STEPS.map((least, at) => (at === STEPS.length - 1
    ? make("b", { class: `p${at}` }, `below ${STEPS[at - 1] * 100}%`)
    : make("b", { class: `p${at}` }, `from ${least * 100}%`)));
  return make("p", { id: "legend" }, "How probable the model found each token:", ...words);
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share < 0.01) return "below 0.01%";
  return `${share >= 10 ? Math.round(share) : Number(share.toPrecision(2))}%`;
}

const BYTES = /^bytes:(\\x[0-9a-f]{2})+$/;

/** The bytes of a token, which is written `bytes:\xe2\x80` where it is no whole character. */
function bytesOf(token) {
  if (!BYTES.test(token)) return new TextEncoder().encode(token);
  return Uint8Array.from(token.matchAll(/\\x(..)/g), ([, hex]) => parseInt(hex, 16));
}

/** The text of tokens together; null while their last character is not complete. */
function textOf(tokens) {
  const bytes = tokens.flatMap((token) => [...bytesOf(token)]);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return null;
  }
}

/** A token so that its spaces and breaks are seen. */
function spelled(token) {
  if (BYTES.test(token)) return `${token.slice(6).replaceAll("\\x", " ").trim()} (part of a character)`;
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

let numDetails = 0;

/** The tokens of one text, each with the likeliest ones in its place. One of them is in the tab
 * order; arrow keys go on from there. */
class TokenView {
  constructor(block, index) {
    this.index = index;
    this.numShown = 0;
    this.covered = 0; // of the text's length, so much is shown
    this.detail = make("div", { class: "detail", role: "tooltip", id: `detail-${numDetails += 1}` });
    this.detail.hidden = true;
    this.element = make("span", { role: "group", "aria-label": `Tokens of text ${index + 1}; arrow keys go from one to the next` });
    this.block = block;
    block.append(this.detail);
    this.element.addEventListener("pointerover", ({ target }) => this.open(target));
    this.element.addEventListener("focusin", ({ target }) => this.open(target));
    this.element.addEventListener("click", ({ target }) => this.open(target));
    this.element.addEventListener("focusout", () => this.close());
    this.element.addEventListener("pointerout", ({ pointerType }) => pointerType === "mouse" && this.close());
    block.addEventListener("keydown", (event) => this.press(event));
  }

  /** Shows further tokens; those of a character that is not complete, and those whose text has
   * not come yet, only at the end. */
  show({ tokens, text }, isEnd) {
    let group = [];
    const add = () => {
      const own = textOf(group.map(([token]) => token)) ?? "\ufffd";
      if (!isEnd && this.covered + own.length > text.length) return false;
      this.add(group, own, text);
      group = [];
      return true;
    };
    for (const token of tokens.slice(this.numShown)) {
      const isPart = BYTES.test(token[0]);
      if (group.length && !isPart && !add()) return; // it will not be completed
      group.push(token);
      if (textOf(group.map(([each]) => each)) !== null && !add()) return;
    }
    if (!isEnd) return;
    if (group.length) add();
    this.element.append(text.slice(this.covered)); // what no token covers
    this.covered = text.length;
  }

  add(group, own, all) {
    this.numShown += group.length;
    const start = all.indexOf(own, this.covered);
    if (start < 0 || !own) return; // it adds nothing to the text, as the end of a text does
    this.element.append(all.slice(this.covered, start));
    this.covered = start + own.length;
    const logprob = group.reduce((sum, [, each]) => sum + each, 0);
    const token = make("span", {
      class: `token ${classOf(Math.exp(logprob))}`,
      role: "button",
      tabindex: this.element.firstElementChild ? -1 : 0,
      "aria-label": `${own.trim() || spelled(own)}, ${percent(logprob)}`,
      "aria-describedby": this.detail.id,
    }, own.replaceAll("\n", "↵\n"));
    token.group = group;
    this.element.append(token);
  }

  open(target) {
    const token = target.closest(".token");
    if (!token) return;
    const { group } = token;
    const [drawn, , top] = group[0];
    const rows = Object.entries(top).sort(([, a], [, b]) => b - a).map(([name, logprob]) => {
      const row = make("li", { class: name === drawn ? "drawn" : "" },
        make("code", {}, spelled(name)), make("span", {}, percent(logprob)));
      row.style.setProperty("--share", `${100 * Math.exp(logprob)}%`);
      return row;
    });
    const heading = group.length > 1
      ? `One character of ${group.length} tokens. Likeliest for the first:`
      : "What the model found likeliest here:";
    this.detail.replaceChildren(make("p", {}, heading), make("ol", {}, ...rows));
    this.detail.hidden = false;
    const block = this.block.getBoundingClientRect();
    const [first] = token.getClientRects();
    const right = block.width - this.detail.offsetWidth;
    this.detail.style.setProperty("left", `${Math.max(0, Math.min(first.left - block.left, right))}px`);
    this.detail.style.setProperty("top", `${first.bottom - block.top + 2}px`);
  }

  close() {
    this.detail.hidden = true;
  }

  press(event) {
    const token = event.target.closest(".token");
    if (token && ["Enter", " "].includes(event.key) && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      this.open(token);
    }
    const next = {
      ArrowRight: token?.nextElementSibling,
      ArrowLeft: token?.previousElementSibling,
      Home: this.element.firstElementChild,
      End: this.element.lastElementChild,
    }[event.key];
    if (!token || !next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

const hasTokens = ({ choices }) => Boolean(choices[0].tokens);

/** The token view on or off. A run that has no probabilities is asked for again: its seed
 * makes it the same. */
function switchView() {
  if (!shown) return formChanged();
  const isOn = $("logprobs").checked;
  if (isOn && !shown.answers.every(hasTokens)) {
    shown.logprobs = true;
    perform(shown);
  } else {
    // The tokens stay with the run; it is drawn without them.
    shown.logprobs = isOn;
    if (stopper) return perform(shown);
    writeAddress(shown); // not the form's, whose seed may be empty
    show(shown);
  }
}

// --- Copying ------------------------------------------------------------------------------------

async function copy(by, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // it is missing wherever the page comes by plain http from another machine
    const area = make("textarea", { readonly: "", class: "unseen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    by.focus();
  }
  const words = by.dataset.words ??= by.textContent;
  by.textContent = "Copied";
  say("Copied.");
  await sleep(1500);
  by.textContent = words;
}

const apiAddress = () => new URL("v1", location.href.replace(/[?#].*/s, "")).href;
const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl(body) {
  return [
    `curl ${inShell(`${apiAddress()}/completions`)}`,
    "-H 'Content-Type: application/json'",
    ...(key() ? ['-H "Authorization: Bearer $API_KEY"'] : []),
    `-d ${inShell(JSON.stringify(body))}`,
  ].join(" \\\n     ");
}

/** JSON's texts, numbers and lists are Python's too. */
function asPython({ top_k, ...body }) {
  const lines = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  return [
    ...(key() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    "client = OpenAI(",
    `    base_url=${JSON.stringify(apiAddress())},`,
    `    api_key=${key() ? 'os.environ["API_KEY"]' : '"none"'},`,
    ")",
    "completion = client.completions.create(",
    ...lines,
    `    extra_body={"top_k": ${top_k}},`,
    ")",
    "for choice in completion.choices:",
    "    print(choice.text)",
    "",
  ].join("\n");
}

// --- History ------------------------------------------------------------------------------------

const MAX_RUNS = 30;

const isRun = (run) => typeof run?.fields?.prompt === "string"
  && Array.isArray(run.fields.stop ?? []) && Array.isArray(run.models) && Array.isArray(run.answers)
  && run.answers.every((answer) => answer?.choices?.length
    && answer.choices.every?.((choice) => typeof choice?.text === "string"));

/** Another version of this page may have left something else there. */
function keptRuns() {
  const kept = parsed(store.getItem("runs") ?? "[]");
  return Array.isArray(kept) ? kept.filter(isRun) : [];
}

let runs = keptRuns();

function remember(run) {
  runs = [run, ...runs.filter((each) => each !== run)].slice(0, MAX_RUNS);
  listRuns();
}

function listRuns() {
  // Without the tokens, which are many and can be had again.
  const kept = JSON.stringify(runs, (name, value) => (name === "tokens" && Array.isArray(value) ? null : value));
  try {
    store.setItem("runs", kept);
  } catch {
    // It is full: then they last until the page is left.
  }
  $("runs").replaceChildren(...runs.map((run) => {
    const { fields, models } = run;
    const made = button(make("span", {}, fields.prompt.slice(0, 200)), () => {
      stop();
      fillForm(run);
      run.logprobs = $("logprobs").checked;
      if (run.logprobs && !run.answers.every(hasTokens)) {
        perform(run); // the tokens were not kept; its seed makes it the same
      } else {
        writeAddress(run);
        show(run);
      }
      $("result").focus();
    });
    made.append(make("small", {}, [
      models.join(", "), `seed ${fields.seed}`, `temperature ${fields.temperature}`,
      `length ${fields.max_tokens}`, `${fields.n} ${fields.n === 1 ? "sequence" : "sequences"}`,
    ].join(" · ")));
    return make("li", {}, made);
  }));
  $("clear").hidden = !runs.length;
  $("no-runs").hidden = Boolean(runs.length);
}

function clearRuns() {
  runs = [];
  listRuns();
  $("prompt").focus();
  say("The history is cleared.");
}

// --- The service now ----------------------------------------------------------------------------

const POLL_SECONDS = 2;
const samples = []; // [seconds, tokens generated since the service began] of the last minute

/** The sum of a metric over the models. */
function metric(text, name) {
  const lines = text.matchAll(new RegExp(`^${name}(?:\\{.*\\})? (\\S+)$`, "gm"));
  return [...lines].reduce((sum, [, value]) => sum + Number(value), 0);
}

function showLive(text) {
  const now = performance.now() / 1000;
  const tokens = metric(text, "vllm:generation_tokens_total");
  if (samples.length && tokens < samples.at(-1)[1]) samples.length = 0; // it began anew
  samples.push([now, tokens]);
  while (samples.at(-1)[0] - samples[0][0] > 60) samples.shift();
  const rates = samples.slice(1).map(([seconds, count], at) => {
    const [before, countBefore] = samples[at];
    return [60 - (now - seconds), (count - countBefore) / (seconds - before)];
  });
  const most = Math.max(1, ...rates.map(([, rate]) => rate));
  const points = rates.map(([x, rate]) => `${x.toFixed(1)},${(19 - 18 * rate / most).toFixed(1)}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
  const seconds = now - samples[0][0];
  $("running").textContent = metric(text, "vllm:num_requests_running");
  $("waiting").textContent = metric(text, "vllm:num_requests_waiting");
  $("rate").textContent = seconds ? Math.round((tokens - samples[0][1]) / seconds) : 0;
}

async function watch() {
  for (;;) {
    if (document.visibilityState === "visible") {
      const response = await fetch("metrics", { headers: keyHeader() }).catch(() => null);
      $("live").hidden = !response?.ok;
      if (response?.ok) showLive(await response.text().catch(() => ""));
      // Without a key, or where there are no figures; start() begins again with another key.
      if ([401, 404].includes(response?.status)) return;
    }
    await sleep(1000 * POLL_SECONDS);
  }
}

// --- Start --------------------------------------------------------------------------------------

let watching = null;

/** Sets the page up; where the service is away or busy, once it is back. False: it did not. */
async function start() {
  watching ??= watch().finally(() => { watching = null; });
  for (;;) {
    try {
      await load();
      $("problem").replaceChildren();
      return true;
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (!problem.isGone && !problem.waitSeconds) {
        tell($("problem"), problem);
        return false;
      }
      if (!await waitToRetry($("problem"), problem)) return false;
    }
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!event.repeat) generate(); // a key held down asks once
  }
  if (event.key === "Escape") { // from wherever the focus is: the mouse opens details, too
    for (const detail of document.querySelectorAll(".detail")) detail.hidden = true;
  }
});
$("stop").addEventListener("click", () => {
  if (!stopper) return;
  stop();
  say("Stopped.");
});
document.addEventListener("input", ({ target }) => {
  target.removeAttribute("aria-invalid");
  if (target.dataset.of) $(target.dataset.of).value = target.value;
  else if (NUMBERS.includes(target.id)) {
    const slider = document.querySelector(`[data-of=${target.id}]`);
    if (slider) slider.value = target.value;
  }
  if (target.id !== "key" && target.id !== "logprobs") formChanged();
});
$("examples").addEventListener("click", ({ target }) => {
  if (target.type !== "button") return;
  $("prompt").value = target.textContent;
  $("prompt").focus();
  formChanged();
});
$("dice").addEventListener("click", () => {
  setNumber("seed", drawSeed());
  formChanged();
  say(`Seed ${$("seed").value}`);
});
$("logprobs").addEventListener("change", switchView);
$("key-field").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});
$("forget-key").addEventListener("click", forgetKey);
$("clear").addEventListener("click", clearRuns);
addEventListener("hashchange", readNewAddress);

if (key()) showKeyField();
listRuns();
readPrompt();
start();
