// Holds the form of a kind: which fields the service takes for it, what is in them, and the link.

import { Problem } from "./api.js";
import { $, make } from "./browser.js";

const NAMES = {
  seed: "Seed", steps: "Steps", guidance: "Guidance", size: "Size", seconds: "Seconds",
  num_frames: "Frames", frames_per_second: "Frames per second", grid_size: "Grid",
};

let schema = null; // This is what the fields on display were made from.

/** Makes the fields that the service describes, with what the link says in them. */
export function showFields(described, link) {
  schema = described.properties;
  const names = Object.keys(schema).filter((name) => name in NAMES);
  $("fields").lastElementChild.replaceChildren(...names.map((name) => fieldOf(name, link.get(name))));
  $("fields").disabled = false;
}

function fieldOf(name, value) {
  const { type, minimum, maximum, default: preset } = schema[name];
  const input = make("input", {
    id: name, type: type === "string" ? "text" : "number", "aria-describedby": `about-${name}`,
    placeholder: name === "seed" ? "a new one each time" : "the model's own",
  });
  if (type !== "string") Object.assign(input, { step: type === "integer" ? 1 : "any" });
  for (const [bound, number] of [["min", minimum], ["max", maximum]]) {
    if (number !== undefined) input[bound] = number;
  }
  input.value = value ?? preset ?? "";
  const range = maximum === undefined ? "" : `${minimum ?? 0} to ${maximum}`;
  const about = { seed: "The same seed gives the same result.", size: "Like 512x512." }[name] ?? range;
  return make("div", { class: "param" },
    make("label", { for: name }, NAMES[name]), input, make("small", { id: `about-${name}` }, about));
}

/** Reads what the form asks for; fields that are empty are left out. */
export function readFields() {
  const prompt = $("prompt");
  if (!prompt.value) throw new Problem("Write what is to be made.", { field: prompt });
  const fields = { prompt: prompt.value };
  for (const input of $("fields").querySelectorAll("input")) {
    if (!input.checkValidity()) {
      throw new Problem(`${NAMES[input.id]}: ${input.validationMessage}`, { field: input });
    }
    if (input.value) fields[input.id] = input.type === "number" ? Number(input.value) : input.value;
  }
  return fields;
}

// After the #, a link stays out of every server's log.
export const linkTo = (kind, fields) => `static/media.html#${kind}?${new URLSearchParams(fields)}`;

/** Gives the kind and the fields that the address names. */
export function readLink() {
  const [kind, fields] = location.hash.slice(1).split("?");
  return [kind, new URLSearchParams(fields ?? "")];
}
