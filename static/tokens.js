// Shows a text as tokens: how probable the model found each, and what was likeliest there.

import { make } from "./browser.js";

// The classes of probability begin here. They differ in colour and underline.
const STEPS = [0.5, 0.2, 0.05, 0.01, 0];
const classOf = (probability) => `p${STEPS.findIndex((least) => probability >= least)}`;

export function legend() {
  const words = STEPS.map((least, at) => make("b", { class: `p${at}` },
    least ? `from ${least * 100}%` : `below ${STEPS[at - 1] * 100}%`));
  return make("p", { id: "legend" }, "How probable the model found each token:", ...words);
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share < 0.01) return "below 0.01%";
  return `${share >= 10 ? Math.round(share) : Number(share.toPrecision(2))}%`;
}

// Part of a character comes as its bytes, such as `bytes:\xe2\x80`.
const BYTES = /^bytes:(\\x[0-9a-f]{2})+$/;

function bytesOf(token) {
  if (!BYTES.test(token)) return new TextEncoder().encode(token);
  return Uint8Array.from(token.matchAll(/\\x(..)/g), ([, hex]) => parseInt(hex, 16));
}

/** Joins tokens to text, or gives null if their last character is not complete. */
function textOf(tokens) {
  const bytes = tokens.flatMap((token) => [...bytesOf(token)]);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return null;
  }
}

/** Writes a token so that its spaces and breaks are seen. */
function spelled(token) {
  if (BYTES.test(token)) return `${token.slice(6).replaceAll("\\x", " ").trim()} (part of a character)`;
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

let numDetails = 0;

/** Closes every detail. The mouse may have opened one far from the focus. */
export function closeDetails() {
  for (const detail of document.querySelectorAll(".detail")) detail.hidden = true;
}

/** Shows one text. A single token is in the tab order, and arrow keys go on from there. */
export class TokenView {
  constructor(block, index) {
    this.block = block;
    this.numShown = 0;
    this.covered = 0; // So much of the text is on display.
    this.detail = make("div", { class: "detail", role: "tooltip", id: `detail-${numDetails += 1}` });
    this.detail.hidden = true;
    this.element = make("span", { role: "group", "aria-label": `Tokens of text ${index + 1}; arrow keys go from one to the next` });
    block.append(this.detail);
    for (const type of ["pointerover", "focusin", "click"]) {
      this.element.addEventListener(type, ({ target }) => this.open(target));
    }
    this.element.addEventListener("focusout", () => this.close());
    this.element.addEventListener("pointerout", ({ pointerType }) => pointerType === "mouse" && this.close());
    block.addEventListener("keydown", (event) => this.press(event));
  }

  /** Shows further tokens. Unless this is the end, part of a character waits for its rest,
   * and a token for its text. */
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
      if (group.length && !isPart && !add()) return; // The character will not be completed.
      group.push(token);
      if (textOf(group.map(([each]) => each)) !== null && !add()) return;
    }
    if (!isEnd) return;
    if (group.length) add();
    this.element.append(text.slice(this.covered)); // No token covers this.
    this.covered = text.length;
  }

  /** Adds a group of tokens that together make `own`, a piece of the text `all`. */
  add(group, own, all) {
    this.numShown += group.length;
    const start = all.indexOf(own, this.covered);
    if (start < 0 || !own) return; // The end of a text is such a token: it adds nothing.
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
    this.placeDetail(token);
  }

  placeDetail(token) {
    const block = this.block.getBoundingClientRect();
    const [first] = token.getClientRects();
    const right = block.width - this.detail.offsetWidth;
    this.detail.style.left = `${Math.max(0, Math.min(first.left - block.left, right))}px`;
    this.detail.style.top = `${first.bottom - block.top + 2}px`;
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
