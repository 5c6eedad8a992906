// Shows a run: the models' answers side by side, each text growing as it streams in.

import { $, button, make, say } from "./browser.js";
import { asCurl, asPython, copy } from "./copy.js";
import { bodyOf, formChanged, linkTo, setNumber } from "./parameters.js";
import { legend, TokenView } from "./tokens.js";

function endOf(run, choice) {
  return {
    length: `reached the length of ${run.fields.max_tokens} tokens`,
    stop: run.fields.stop ? "ended by the model, or before a stop string" : "ended by the model",
    content_filter: "ended by the word filter",
    stopped: "stopped",
    broken: "broken off",
  }[choice.end] ?? "";
}

/** Shows one model's answer. */
class Pane {
  constructor(run, answer) {
    Object.assign(this, { run, answer, isRunning: false });
    this.name = make("h3", {});
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
    const { choices, name, model } = this.answer;
    this.name.textContent = name ?? model;
    this.drawn = choices.map((choice, at) => this.draw(choice, at));
    this.choices.replaceChildren(...this.drawn.map(({ element }) => element));
    this.drawn.forEach(({ choice }, index) => this.grow(index, choice.text));
    this.showEnds();
  }

  /** Makes the elements of a choice, still without its text. */
  draw(choice, at) {
    const { run, answer } = this;
    const { prompt } = run.fields;
    const text = make("p", { class: "text" }, make("span", { class: "given" }, this.given()));
    const made = new Text();
    const end = make("span", {});
    const copier = button("Copy", (by) => copy(by, prompt + choice.text));
    copier.setAttribute("aria-label", `Copy text ${at + 1} of ${answer.model}`);
    const element = make("div", { class: "choice" }, text, make("div", { class: "end" }, end, copier));
    const tokens = run.logprobs && choice.tokens ? new TokenView(element, at) : null;
    text.append(tokens?.element ?? made);
    return { choice, element, text, made, end, copier, tokens };
  }

  /** Gives the prompt, or of a long one the end, where the text goes on. */
  given() {
    const { prompt } = this.run.fields;
    const most = this.answer.choices.length * this.run.models.length > 1 ? 100 : 2000;
    return prompt.length > most ? `…${[...prompt.slice(-most)].slice(1).join("")}` : prompt;
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

  /** Puts a caret after texts that still grow, and says why the others ended. */
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

  /** Says how it went to those who do not see it. */
  summary() {
    const { run, answer, notice } = this;
    const name = answer.name ?? answer.model;
    if (notice.hasChildNodes()) return `${name}: ${notice.firstChild.textContent}`;
    const ends = new Set(answer.choices.map((choice) => endOf(run, choice)));
    return `${name}: ${answer.figures?.tokens ?? 0} tokens, ${[...ends].join("; ")}.`;
  }
}

/** Puts a run on display, and gives a pane for each of its answers. */
export function show(run) {
  const panes = run.answers.map((answer) => new Pane(run, answer));
  const head = make("div", { class: "row" },
    make("h2", {}, `Result, seed ${run.fields.seed}`),
    button("Keep seed", () => {
      setNumber("seed", run.fields.seed);
      formChanged();
      say("The seed is kept.");
    }),
    button("Copy link", (by) => copy(by, new URL(linkTo(run), location.href).href)));
  const side = make("div", { class: "panes" }, ...panes.map((pane) => pane.element));
  $("result").replaceChildren(head, ...(run.logprobs ? [legend()] : []), side);
  return panes;
}
