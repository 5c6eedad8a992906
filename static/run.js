// Carries out a run, which is what one press of the button asks for, and what comes of it.
//
// It is plain JSON: {fields, models, logprobs, answers}. Each of the answers is
// {model, choices: [{text, end, tokens}], figures}. Without the token view, tokens are null.

import { complete, isStop, Problem } from "./api.js";
import { $, say } from "./browser.js";
import { tell, waitToRetry } from "./notice.js";
import { bodyOf, formChanged, writeAddress } from "./parameters.js";
import { show } from "./result.js";

const hasTokens = ({ choices }) => Boolean(choices[0].tokens);

function emptyChoices(run) {
  return Array.from({ length: run.fields.n }, () => ({
    text: "", end: null, tokens: run.logprobs ? [] : null,
  }));
}

export function newRun(asked) {
  const answerOf = (model) => ({ model, choices: emptyChoices(asked), figures: null });
  return { ...asked, answers: asked.models.map(answerOf) };
}

/** Streams a model's answer into its pane, up to the end. */
async function receive(run, answer, pane, signal) {
  const started = performance.now();
  let figures = null;
  let firstTokens = 0;
  for await (const { model, choices, usage } of complete(bodyOf(run, answer.model), signal)) {
    const ms = performance.now() - started;
    if (!figures) { // What an earlier attempt has left goes only now.
      figures = { tokens: 0, firstMs: ms, perSecond: 0 };
      firstTokens = usage.completion_tokens;
      Object.assign(answer, { name: model, figures, choices: emptyChoices(run) });
      pane.clear();
    }
    for (const choice of choices) {
      add(answer.choices[choice.index], choice);
      pane.grow(choice.index, choice.text);
    }
    figures.tokens = usage.completion_tokens;
    const since = (ms - figures.firstMs) / 1000;
    if (since > 0 && choices.length) figures.perSecond = (figures.tokens - firstTokens) / since;
    pane.showFigures();
  }
}

function add(choice, { text, finish_reason, logprobs }) {
  choice.text += text;
  choice.end = finish_reason ?? choice.end;
  for (const [at, token] of (logprobs?.tokens ?? []).entries()) {
    choice.tokens.push([token, logprobs.token_logprobs[at], logprobs.top_logprobs[at]]);
  }
}

/** Tells of a problem in the pane, and gives true once it is time to ask again. */
async function shallRetry(pane, problem, attempt, signal) {
  if (!problem.waitSeconds) {
    // When the service is back we do not ask again, since there may be text here.
    if (problem.isGone) waitToRetry(pane.notice, problem);
    else tell(pane.notice, problem);
    return false;
  }
  problem.waitSeconds = Math.max(problem.waitSeconds, Math.min(2 ** attempt, 30));
  const isTime = await waitToRetry(pane.notice, problem, signal);
  if (isTime) pane.notice.replaceChildren();
  else if (pane.notice.isConnected) tell(pane.notice, new Problem("Cancelled. Generate tries again."));
  return isTime;
}

/** Carries out one run at a time. A run that brought text is handed to `remember`. */
export class Runner {
  #remember;
  #shown = null; // This run is on display.
  #refused = null; // This run lacked a key.
  #stopper = null; // This aborts what is under way.

  constructor(remember) {
    this.#remember = remember;
  }

  /** Asks the models, and stops what was under way. */
  async perform(run, words = "Generating.") {
    this.stop();
    this.#refused = null;
    const mine = this.#stopper = new AbortController();
    const { signal } = mine;
    $("stop").removeAttribute("aria-disabled");
    const panes = this.#show(run);
    say(words);
    try {
      await Promise.all(run.answers.map((answer, at) => this.#ask(run, answer, panes[at], signal)));
    } finally { // Whatever happened, nothing is left to stop.
      if (mine === this.#stopper) this.#setIdle();
    }
    if (run.answers.some(({ figures }) => figures)) this.#remember(run);
    if (signal.aborted) return; // The user stopped it, or began another.
    // Problems have been told already. Beside a text they are told with it.
    if (panes.every((pane) => pane.notice.hasChildNodes())) return;
    say(panes.map((pane) => pane.summary()).join(" "));
  }

  /** Has a model answer, if need be in several attempts. */
  async #ask(run, answer, pane, signal) {
    for (let attempt = 0; ; attempt += 1) {
      pane.setRunning(true);
      try {
        return await receive(run, answer, pane, signal);
      } catch (error) {
        const end = isStop(error) ? "stopped" : "broken";
        if (isStop(error) || answer.figures) for (const choice of answer.choices) choice.end ??= end;
        if (isStop(error)) return;
        if (!(error instanceof Problem)) throw error;
        pane.setRunning(false);
        if (error.isKey) this.#refused = run;
        if (!await shallRetry(pane, error, attempt, signal)) return;
      } finally {
        pane.setRunning(false);
      }
    }
  }

  #show(run) {
    this.#shown = run;
    const panes = show(run);
    writeAddress(run); // The form's own link may lack the seed.
    return panes;
  }

  #setIdle() {
    this.#stopper = null;
    $("stop").setAttribute("aria-disabled", "true");
  }

  /** Stops what is under way, and gives false if nothing is. */
  stop() {
    const isRunning = Boolean(this.#stopper);
    this.#stopper?.abort();
    this.#setIdle();
    return isRunning;
  }

  /** Shows a run with tokens or without. To get them we ask again: the seed keeps the text. */
  #display(run) {
    run.logprobs = $("logprobs").checked;
    if (this.#stopper || (run.logprobs && !run.answers.every(hasTokens))) this.perform(run);
    else this.#show(run);
  }

  switchView() {
    if (this.#shown) this.#display(this.#shown);
    else formChanged();
  }

  reopen(run) {
    this.stop();
    this.#display(run);
    $("result").focus();
  }

  /** Performs the run on display again if it lacked a key, and gives false if it did not. */
  performRefused(words) {
    const run = this.#refused;
    if (!run || run !== this.#shown) return false;
    this.perform(run, words);
    return true;
  }
}
