// Tells the user of a problem in a notice on the page, and waits for one that passes.

import { isHealthy, key, Problem } from "./api.js";
import { $, button, make, say, sleep } from "./browser.js";

export function showKeyField() {
  $("key-field").hidden = false;
  $("forget-key").hidden = !key();
  $("key").placeholder = key() ? "a key is set" : "";
}

export function askForKey() {
  showKeyField();
  $("key").focus();
}

/** Puts a problem into a notice, with further elements after its words. */
export function tell(notice, problem, ...further) {
  if (problem.isKey) askForKey();
  notice.replaceChildren(make("p", {}, problem.message));
  if (problem.said) notice.append(make("small", {}, problem.said));
  notice.append(...further);
  say(problem.message);
}

/** Tells of a problem and waits for it to pass. Gives false if the user moves on instead. */
export function waitToRetry(notice, problem, signal) {
  return problem.isGone ? waitForService(notice, problem) : countDown(notice, problem, signal);
}

async function waitForService(notice, problem) {
  tell(notice, problem, make("p", {}, "Waiting for it to come back …"));
  do {
    await sleep(1000);
    // The notice may have gone by now, or say something else.
    if (!notice.isConnected || notice.firstChild?.textContent !== problem.message) return false;
  } while (!await isHealthy());
  tell(notice, new Problem("The service is back. Generate again."));
  return true;
}

async function countDown(notice, problem, signal) {
  const left = make("span", {});
  let cancel;
  const keepFocus = () => { // The focus would get lost with the button.
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
