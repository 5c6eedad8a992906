// In node, and as a module of a page in Chromium (chromium.py).
import OpenAI from "openai";
import { VERSION } from "openai/version";

export async function call(address, model) {
  const client = new OpenAI({
    baseURL: `${address}/v1`,
    apiKey: "none",
    dangerouslyAllowBrowser: true,
    defaultHeaders: { "OpenAI-Beta": "assistants=v2", traceparent: "00-1-2-01" },
  });
  const body = { model, prompt: "Once upon a time", max_tokens: 8, seed: 1 };
  const text = (await client.completions.create(body)).choices[0].text;
  let streamed = "";
  for await (const chunk of await client.completions.create({ ...body, stream: true }))
    streamed += chunk.choices[0].text;
  if (streamed !== text || !text) throw new Error("the stream has another text");

  const messages = [{ role: "user", content: "Tell me a tale." }];
  const chat = await client.chat.completions.create({ model, messages, max_tokens: 8 });
  if (chat.usage.completion_tokens < 1) throw new Error("the chat has no text");
  const listed = (await client.models.list()).data.map((each) => each.id);
  if (!listed.includes(model)) throw new Error("the model is not listed");
  const refused = await client.completions
    .create({ ...body, model: "no-such-model" })
    .catch((error) => error.code);
  if (refused !== "model_not_found") throw new Error("an unknown model was taken");
  return `openai (npm) ${VERSION}`;
}

if (globalThis.process) console.log(await call(process.env.ADDRESS, process.env.MODEL));
