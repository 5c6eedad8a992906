import { createCompletion } from "./client";

createCompletion({
  baseUrl: process.env.ADDRESS,
  body: { prompt: "Once", max_tokens: 4 },
  throwOnError: true,
}).then(({ data }) => {
  if (data.choices[0].finish_reason !== "length") throw new Error(JSON.stringify(data));
});
