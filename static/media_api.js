// Asks the service for all but text.

import { events, gone, keyHeader, lostConnection, Problem, problemOf } from "./api.js";
import { parsed } from "./browser.js";

/** Asks for a sound, picture, video or shape, and gives its steps and then the result. */
export async function* makeMedia(kind, body, signal) {
  const response = await fetch(`generate/${kind}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...keyHeader() },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  }).catch(lostConnection);
  if (!response.ok) throw await problemOf(response);
  for await (const data of events(response)) {
    const told = parsed(data);
    if (told?.detail) throw new Problem("It came to nothing.", { said: told.detail });
    if (!told) throw new Problem("The answer came garbled: something on its way changed it. Try again.");
    yield told;
    if (told.content) return;
  }
  throw gone();
}
