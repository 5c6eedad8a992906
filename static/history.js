// Lists the runs of this session, so that the user can bring one back. They stay in the tab.

import { $, button, make, parsed, say, store } from "./browser.js";

const MAX_RUNS = 30;

// Another version of this page may have left something else there.
const isRun = (run) => typeof run?.fields?.prompt === "string"
  && Array.isArray(run.fields.stop ?? []) && Array.isArray(run.models) && Array.isArray(run.answers)
  && run.answers.every((answer) => answer?.choices?.length
    && answer.choices.every?.((choice) => typeof choice?.text === "string"));

function keptRuns() {
  const kept = parsed(store.getItem("runs") ?? "[]");
  return Array.isArray(kept) ? kept.filter(isRun) : [];
}

function keep(runs) {
  // Tokens are many, and can be asked for again.
  const kept = JSON.stringify(runs, (name, value) => (name === "tokens" && Array.isArray(value) ? null : value));
  try {
    store.setItem("runs", kept);
  } catch {
    // The storage is full. Then they last until the page is left.
  }
}

export class History {
  #runs = keptRuns();
  #choose;

  /** A run that the user picks is handed to `choose`. */
  constructor(choose) {
    this.#choose = choose;
    this.#update();
  }

  remember(run) {
    this.#runs = [run, ...this.#runs.filter((each) => each !== run)].slice(0, MAX_RUNS);
    this.#update();
  }

  clear() {
    this.#runs = [];
    this.#update();
    $("prompt").focus();
    say("The history is cleared.");
  }

  #update() {
    const runs = this.#runs;
    keep(runs);
    $("runs").replaceChildren(...runs.map((run) => make("li", {}, this.#buttonFor(run))));
    $("clear").hidden = !runs.length;
    $("no-runs").hidden = Boolean(runs.length);
  }

  #buttonFor(run) {
    const { fields, models } = run;
    const made = button(make("span", {}, fields.prompt.slice(0, 200)), () => this.#choose(run));
    made.append(make("small", {}, [
      models.join(", "), `seed ${fields.seed}`, `temperature ${fields.temperature}`,
      `length ${fields.max_tokens}`, `${fields.n} ${fields.n === 1 ? "sequence" : "sequences"}`,
    ].join(" · ")));
    return made;
  }
}
