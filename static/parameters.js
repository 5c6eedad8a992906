// Holds the form: which values its fields take, what they ask for, and the link to all that.

import { describe, Problem } from "./api.js";
import { $, make } from "./browser.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "n", "seed"];

// This is what the service takes, once load() has asked it.
let service = { ranges: null, firstValues: null, modelNames: [], numStops: 0, numLogprobs: 0 };

export const isLoaded = () => Boolean(service.ranges);

// --- Setting up

function rangeOf(schema) {
  const of = schema.anyOf?.find((each) => each.type !== "null") ?? schema;
  return {
    isWhole: of.type === "integer",
    min: Math.max(of.minimum ?? 0, 0), // What is below that only turns something off.
    // Beyond that, JavaScript's numbers are not exact.
    max: Math.min(of.maximum ?? Infinity, Number.MAX_SAFE_INTEGER),
  };
}

function read({ CompletionRequest, GenerateRequest }, modelNames) {
  const asked = CompletionRequest.properties;
  // The native route limits the length, and its first values suit a reader better.
  const native = GenerateRequest.properties;
  const ranges = Object.fromEntries(NUMBERS.map((name) => [name, rangeOf(asked[name])]));
  ranges.max_tokens = rangeOf(native.max_new_tokens);
  return {
    ranges,
    modelNames,
    numStops: asked.stop.anyOf.find((each) => each.type === "array").maxItems,
    numLogprobs: Math.min(5, rangeOf(asked.logprobs).max), // More would not fit beside a token.
    firstValues: {
      max_tokens: native.max_length.default, temperature: native.temperature.default,
      top_p: native.top_p.default, top_k: native.top_k.default, n: asked.n.default,
    },
  };
}

/** Asks the service what it takes, and sets the form up for that. */
export async function load() {
  const { schemas, modelNames } = await describe();
  const isFirst = !isLoaded();
  service = read(schemas, modelNames);
  for (const name of NUMBERS) {
    const { isWhole, min, max } = service.ranges[name];
    const bounds = { min, max, step: isWhole ? 1 : 0.05 };
    Object.assign($(name), bounds);
    Object.assign(sliderOf(name) ?? {}, bounds);
  }
  const chosen = chosenModels();
  $("models").lastElementChild.replaceChildren(...modelNames.map((name) => {
    const box = make("input", { type: "checkbox", name: "model", value: name });
    box.checked = chosen.includes(name);
    return make("label", { class: "check" }, box, name);
  }));
  $("models").hidden = modelNames.length < 2;
  $("params").disabled = false;
  if (!isFirst) return; // With another key the form keeps what is in it.
  setFirstValues();
  readAddress();
}

/** Sets all fields but the prompt to their first values. */
function setFirstValues() {
  for (const name of NUMBERS) setNumber(name, service.firstValues[name] ?? "");
  $("stop_strings").value = "";
  $("logprobs").checked = false;
  modelBoxes().forEach((box, index) => { box.checked = index === 0; });
}

// --- The fields

const sliderOf = (name) => document.querySelector(`[data-of=${name}]`);
const modelBoxes = () => [...$("models").querySelectorAll("input")];
const chosenModels = () => modelBoxes().filter((box) => box.checked).map((box) => box.value);

function chooseModels(models) {
  for (const box of modelBoxes()) box.checked = models.includes(box.value);
}

/** The seed is short enough to be read out. */
export const drawSeed = () => Math.floor(Math.random() * 1e9);

export function setNumber(name, value) {
  $(name).value = value;
  $(name).removeAttribute("aria-invalid");
  const slider = sliderOf(name);
  if (slider) slider.value = value;
}

/** Reads the number in a field. An empty seed is null. */
function readNumber(name) {
  const field = $(name);
  const { isWhole, min, max } = service.ranges[name];
  if (name === "seed" && field.value === "" && !field.validity.badInput) return null;
  const value = field.value === "" ? NaN : Number(field.value);
  const isRight = value >= min && value <= max && (!isWhole || Number.isInteger(value));
  if (isRight) return value;
  const label = field.labels[0].firstChild.textContent.trim();
  const kind = isWhole ? "a whole number" : "a number";
  throw new Problem(`${label} takes ${kind} from ${min} up to ${max}.`, { field });
}

// The field has a stop string on each line, so a line break in one is written \n.
const written = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
const meant = (line) => line.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]);

function readStops() {
  const { numStops } = service;
  const stops = $("stop_strings").value.split("\n").filter((line) => line).map(meant);
  if (stops.length > numStops) {
    throw new Problem(`At most ${numStops} strings to stop before.`, { field: $("stop_strings") });
  }
  return stops;
}

/** Reads what the form asks for. The seed is null if one is to be drawn. */
export function readForm() {
  const fields = { prompt: $("prompt").value };
  if (!fields.prompt) throw new Problem("Write how the text begins.", { field: $("prompt") });
  for (const name of NUMBERS) fields[name] = readNumber(name);
  const stops = readStops();
  if (stops.length) fields.stop = stops;
  const models = chosenModels();
  if (!models.length) throw new Problem("Choose a model.", { field: modelBoxes()[0] });
  return { fields, models, logprobs: $("logprobs").checked };
}

export function fillForm({ fields, models }) {
  $("prompt").value = fields.prompt;
  for (const name of NUMBERS) setNumber(name, fields[name] ?? "");
  $("stop_strings").value = (fields.stop ?? []).map(written).join("\n");
  chooseModels(models);
}

/** Moves a number's slider along with it, or the number with its slider. */
export function pairUp(field) {
  const slider = NUMBERS.includes(field.id) && sliderOf(field.id);
  if (field.dataset.of) $(field.dataset.of).value = field.value;
  else if (slider) slider.value = field.value;
}

export function bodyOf({ fields, logprobs }, model) {
  return { model, ...fields, ...(logprobs && { logprobs: service.numLogprobs }) };
}

// --- The address. After the #, a link stays out of every server's log.

// Longer addresses get lost on their way from one program to another.
const MAX_LINK = 32_000;

let addressTimer;

export function linkTo({ fields, models, logprobs }) {
  const link = new URLSearchParams();
  for (const [name, value] of Object.entries(fields)) {
    for (const each of [value].flat()) if (each !== null) link.append(name, each);
  }
  if (service.modelNames.length > 1) for (const model of models) link.append("model", model);
  if (logprobs) link.append("logprobs", service.numLogprobs);
  return `#${link}`;
}

export function writeAddress(asked) {
  clearTimeout(addressTimer); // An earlier change of the form would overwrite this.
  const { prompt, ...others } = asked.fields;
  const links = [linkTo(asked), linkTo({ ...asked, fields: others }), "#"];
  history.replaceState(null, "", links.find((link) => link.length <= MAX_LINK));
}

/** Writes the form's link as soon as the user pauses. */
export function formChanged() {
  clearTimeout(addressTimer); // Browsers allow only some hundred changes in half a minute.
  addressTimer = setTimeout(() => {
    if (!isLoaded()) return;
    try {
      writeAddress(readForm());
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem; // A form half filled in has no link.
    }
  }, 500);
}

const linkInAddress = () => new URLSearchParams(location.hash.slice(1));

/** Fills the form from the link. It ignores what is no value for a field, and brings numbers
 * into their ranges. */
function readAddress() {
  const link = linkInAddress();
  for (const name of NUMBERS) {
    const { isWhole, hasMin, min, max } = service.ranges[name];
    let value = Number(link.get(name) || NaN);
    if (!Number.isFinite(value)) continue;
    value = Math.min(Math.max(isWhole ? Math.trunc(value) : value, min), max);
    if (hasMin || value > min) setNumber(name, value);
  }
  const stops = link.getAll("stop").filter((each) => each).slice(0, service.numStops);
  if (stops.length) $("stop_strings").value = stops.map(written).join("\n");
  const models = link.getAll("model").filter((name) => service.modelNames.includes(name));
  if (models.length) chooseModels(models);
  if (link.has("logprobs")) $("logprobs").checked = true;
}

/** Fills in the prompt, which needs no answer of the service. */
export function readPrompt() {
  const link = linkInAddress();
  if (link.has("prompt")) $("prompt").value = link.get("prompt");
}

/** Reads another link in the same tab. Nothing of the form from before is mixed in. */
export function readNewAddress() {
  clearTimeout(addressTimer);
  $("prompt").value = "";
  readPrompt();
  if (!isLoaded()) return;
  setFirstValues();
  readAddress();
}
