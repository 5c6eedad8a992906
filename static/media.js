// The page for all but text starts here: a tab for each kind that is served, a form, a result.

import { describe, dropKey, isStop, keepKey, key, Problem } from "./api.js";
import { $, make, say } from "./browser.js";
import { makeMedia } from "./media_api.js";
import { linkTo, readFields, readLink, showFields } from "./media_fields.js";
import { Progress, showResult } from "./media_result.js";
import { askForKey, showKeyField, tell, waitToRetry } from "./notice.js";

const KINDS = {
  audio: ["Sound", "AudioRequest"], image: ["Picture", "ImageRequest"],
  video: ["Video", "VideoRequest"], "3d": ["Shape", "ShapeRequest"],
};

let schemas = null;
let kind = null; // This one is on display.
let stopper = null; // This aborts what is under way.

/** Asks what is served, and shows a tab for each kind. */
async function start() {
  try {
    ({ schemas } = await describe());
    const served = Object.keys(KINDS).filter((each) => KINDS[each][1] in schemas);
    $("tabs").replaceChildren(make("a", { href: "./" }, "Text"), ...served.map((each) =>
      make("a", { href: linkTo(each, {}), id: `tab-${each}` }, KINDS[each][0])));
    $("problem").replaceChildren();
    if (served.length) showKind(served);
    else tell($("problem"), new Problem("This service makes text only."));
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (!problem.isGone && !problem.waitSeconds) return tell($("problem"), problem);
    if (await waitToRetry($("problem"), problem)) start();
  }
}

/** Shows the form of the kind that the address names, else of the first. */
function showKind(served) {
  stop();
  const [named, link] = readLink();
  kind = served.includes(named) ? named : served[0];
  for (const tab of $("tabs").children) tab.removeAttribute("aria-current");
  $(`tab-${kind}`).setAttribute("aria-current", "page");
  if (link.has("prompt")) $("prompt").value = link.get("prompt");
  showFields(schemas[KINDS[kind][1]], link);
  $("result").replaceChildren(make("p", { class: "note" }, "The result appears here."));
}

function stop() {
  const isRunning = Boolean(stopper);
  stopper?.abort();
  stopper = null;
  $("stop").setAttribute("aria-disabled", "true");
  return isRunning;
}

async function perform() {
  stop();
  const mine = stopper = new AbortController();
  try {
    if (!kind) return await start();
    const fields = readFields();
    history.replaceState(null, "", linkTo(kind, fields));
    $("stop").removeAttribute("aria-disabled");
    $("problem").replaceChildren();
    const progress = new Progress();
    say("It is being made.");
    for await (const told of makeMedia(kind, fields, mine.signal)) {
      if (told.step) progress.show(told);
      else say(showResult(kind, fields, told));
    }
  } catch (problem) {
    if (isStop(problem)) return;
    if (!(problem instanceof Problem)) throw problem;
    tell($("problem"), problem);
    problem.field?.setAttribute("aria-invalid", "true");
    problem.field?.focus();
  } finally {
    if (mine === stopper) stop();
  }
}

const on = (id, type, act) => $(id).addEventListener(type, act);

on("ask", "submit", (event) => {
  event.preventDefault();
  perform();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) perform();
});
document.addEventListener("input", ({ target }) => target.removeAttribute("aria-invalid"));
on("stop", "click", () => {
  if (!stop()) return;
  $("result").replaceChildren(make("p", { class: "note" }, "Stopped."));
  say("Stopped.");
});
on("key-field", "submit", (event) => {
  event.preventDefault();
  keepKey($("key").value.trim());
  $("key").value = "";
  showKeyField();
  start();
});
on("forget-key", "click", () => {
  dropKey();
  askForKey();
  say("The key is forgotten.");
});
addEventListener("hashchange", () => {
  if (schemas) showKind(Object.keys(KINDS).filter((each) => $(`tab-${each}`)));
});

if (key()) showKeyField();
start();
