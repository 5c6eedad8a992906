// Shows what the service does now, from its metrics.

import { getMetrics } from "./api.js";
import { $, sleep } from "./browser.js";

const POLL_SECONDS = 2;

// These are [seconds, tokens generated since the service began], for the last minute.
const samples = [];
let watching = null;

/** Adds a metric up over the models. */
function metric(text, name) {
  const lines = text.matchAll(new RegExp(`^${name}(?:\\{.*\\})? (\\S+)$`, "gm"));
  return [...lines].reduce((sum, [, value]) => sum + Number(value), 0);
}

function show(text) {
  const now = performance.now() / 1000;
  const tokens = metric(text, "vllm:generation_tokens_total");
  if (samples.length && tokens < samples.at(-1)[1]) samples.length = 0; // The service began anew.
  samples.push([now, tokens]);
  while (samples.at(-1)[0] - samples[0][0] > 60) samples.shift();
  draw(now);
  const seconds = now - samples[0][0];
  $("running").textContent = metric(text, "vllm:num_requests_running");
  $("waiting").textContent = metric(text, "vllm:num_requests_waiting");
  $("rate").textContent = seconds ? Math.round((tokens - samples[0][1]) / seconds) : 0;
}

function draw(now) {
  const rates = samples.slice(1).map(([seconds, count], at) => {
    const [before, countBefore] = samples[at];
    return [60 - (now - seconds), (count - countBefore) / (seconds - before)];
  });
  const most = Math.max(1, ...rates.map(([, rate]) => rate));
  const points = rates.map(([x, rate]) => `${x.toFixed(1)},${(19 - 18 * rate / most).toFixed(1)}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
}

async function poll() {
  for (;;) {
    if (document.visibilityState === "visible") {
      const response = await getMetrics();
      $("live").hidden = !response?.ok;
      if (response?.ok) show(await response.text().catch(() => ""));
      // There is no key or there are no figures; another key begins anew.
      if ([401, 404].includes(response?.status)) return;
    }
    await sleep(1000 * POLL_SECONDS);
  }
}

export function watch() {
  watching ??= poll().finally(() => { watching = null; });
}
