// Copies text to the clipboard, and writes requests as code to copy.

import { key } from "./api.js";
import { make, say, sleep } from "./browser.js";

/** Copies the text. The button `by` says so for a moment. */
export async function copy(by, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // Over plain http from another machine a page has no clipboard.
    const area = make("textarea", { readonly: "", class: "unseen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    by.focus();
  }
  const words = by.dataset.words ??= by.textContent;
  by.textContent = "Copied";
  say("Copied.");
  await sleep(1500);
  by.textContent = words;
}

const apiAddress = () => new URL("v1", location.href.replace(/[?#].*/s, "")).href;
const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(body) {
  return [
    `curl ${inShell(`${apiAddress()}/completions`)}`,
    "-H 'Content-Type: application/json'",
    ...(key() ? ['-H "Authorization: Bearer $API_KEY"'] : []),
    `-d ${inShell(JSON.stringify(body))}`,
  ].join(" \\\n     ");
}

/** Python reads JSON's texts, numbers and lists as its own. */
export function asPython({ top_k, ...body }) {
  const lines = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  return [
    ...(key() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    "client = OpenAI(",
    `    base_url=${JSON.stringify(apiAddress())},`,
    `    api_key=${key() ? 'os.environ["API_KEY"]' : '"none"'},`,
    ")",
    "completion = client.completions.create(",
    ...lines,
    `    extra_body={"top_k": ${top_k}},`,
    ")",
    "for choice in completion.choices:",
    "    print(choice.text)",
    "",
  ].join("\n");
}
