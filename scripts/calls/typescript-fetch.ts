import { Configuration, OpenaiApi } from "./client";

const api = new OpenaiApi(new Configuration({ basePath: process.env.ADDRESS }));
api.createCompletion({ completionRequest: { prompt: "Once", maxTokens: 4 } }).then((answer) => {
  if (answer.choices[0].finishReason !== "length") throw new Error(JSON.stringify(answer));
});
