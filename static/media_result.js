// Shows how far a job is, and what came of it: to see, to hear, to turn, to take along.

import { $, button, make } from "./browser.js";
import { copy } from "./copy.js";
import { linkTo } from "./media_fields.js";
import { ShapeView } from "./shape_view.js";

const FILES = { "audio/wav": "wav", "image/png": "png", "video/mp4": "mp4", "model/gltf-binary": "glb" };

const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

let address = null; // This stands for the bytes on display.

/** Gives an address for bytes, and lets go of those that were on display. */
function addressOf(bytes, type) {
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(new Blob([bytes], { type }));
  return address;
}

/** Shows progress until there is a result. */
export class Progress {
  #bar = make("progress", { "aria-label": "Progress", max: 1 });
  #words = make("p", { class: "note" }, "Waiting for its turn …");
  #preview = make("img", { alt: "Preview", hidden: "" });

  constructor() {
    $("result").replaceChildren(this.#bar, this.#words, this.#preview);
  }

  show({ step, of, preview }) {
    if (of) Object.assign(this.#bar, { max: of, value: step });
    this.#words.textContent = of ? `Step ${step} of ${of}` : `Step ${step}`;
    if (!preview) return;
    this.#preview.src = addressOf(bytesOf(preview), "image/jpeg");
    this.#preview.hidden = false;
  }
}

/** Shows the result. Gives what a screen reader is to say. */
export function showResult(kind, fields, { media_type: type, content, seed, model_name: model }) {
  const bytes = bytesOf(content);
  const at = addressOf(bytes, type);
  const name = `${kind}-${seed}.${FILES[type]}`;
  const repeat = { ...fields, seed };
  const head = make("div", { class: "row" },
    make("h2", {}, `${model}, seed ${seed}`),
    make("a", { href: at, download: name }, "Download"),
    button("Copy link", (by) => copy(by, new URL(linkTo(kind, repeat), document.baseURI).href)));
  const shown = {
    image: () => make("img", { src: at, alt: fields.prompt }),
    audio: () => make("audio", { src: at, controls: "" }),
    video: () => make("video", { src: at, controls: "", loop: "", "aria-label": fields.prompt }),
    "3d": () => new ShapeView(bytes.buffer, fields.prompt).element,
  }[kind]();
  $("result").replaceChildren(head, shown);
  return `Made with seed ${seed}.`;
}
