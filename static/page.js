// The page starts here. This ties the other modules to each other and to what the user does.

import { dropKey, keepKey, key, Problem } from "./api.js";
import { $, say } from "./browser.js";
import { History } from "./history.js";
import { watch } from "./live.js";
import { askForKey, showKeyField, tell, waitToRetry } from "./notice.js";
import {
  drawSeed, fillForm, formChanged, isLoaded, load, pairUp, readForm, readNewAddress, readPrompt, setNumber,
} from "./parameters.js";
import { newRun, Runner } from "./run.js";
import { closeDetails } from "./tokens.js";

const runner = new Runner((run) => past.remember(run));
const past = new History((run) => {
  fillForm(run);
  runner.reopen(run);
});

/** Sets the page up, once the service is there. Gives false if that came to nothing. */
async function start() {
  watch();
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

async function generate() {
  try {
    if (!isLoaded()) await load();
    const asked = readForm();
    asked.fields.seed ??= drawSeed();
    $("problem").replaceChildren();
    await runner.perform(newRun(asked));
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    tell($("problem"), problem);
    problem.field?.setAttribute("aria-invalid", "true");
    problem.field?.focus();
  }
}

async function useKey() {
  const typed = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(typed)) { // A header can hold nothing else.
    return tell($("problem"), new Problem("A key has letters, digits and signs, and no space within."));
  }
  keepKey(typed);
  $("key").value = "";
  showKeyField();
  $("prompt").focus();
  if (!await start()) return;
  const words = "The key is accepted.";
  if (!runner.performRefused(`${words} Generating.`)) say(words);
}

const on = (id, type, act) => $(id).addEventListener(type, act);

on("ask", "submit", (event) => {
  event.preventDefault();
  generate();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!event.repeat) generate(); // A key held down asks once.
  }
  if (event.key === "Escape") closeDetails();
});
on("stop", "click", () => {
  if (runner.stop()) say("Stopped.");
});
document.addEventListener("input", ({ target }) => {
  target.removeAttribute("aria-invalid");
  pairUp(target);
  if (target.id !== "key" && target.id !== "logprobs") formChanged();
});
on("examples", "click", ({ target }) => {
  if (target.type !== "button") return;
  $("prompt").value = target.textContent;
  $("prompt").focus();
  formChanged();
});
on("dice", "click", () => {
  setNumber("seed", drawSeed());
  formChanged();
  say(`Seed ${$("seed").value}`);
});
on("logprobs", "change", () => runner.switchView());
on("key-field", "submit", (event) => {
  event.preventDefault();
  useKey();
});
on("forget-key", "click", () => {
  dropKey();
  askForKey();
  say("The key is forgotten.");
});
on("clear", "click", () => past.clear());
addEventListener("hashchange", readNewAddress);

if (key()) showKeyField();
readPrompt();
start();
