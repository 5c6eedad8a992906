"""Generates clients from a service's OpenAPI document, compiles them, and makes a call with each.

    python scripts/generated_clients.py http://localhost:8000 [NAME …]

Needs a network for what it installs into a temporary folder, and java, npm, go and mvn for those
of the clients that are made with them.
"""

import argparse
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

OPENAPI_PYTHON = """
import openapi_client as made
with made.ApiClient(made.Configuration(host="ADDRESS")) as client:
    body = made.CompletionRequest(prompt=made.Prompt("Once"), max_tokens=4)
    print(made.OpenaiApi(client).create_completion(body).choices[0].finish_reason)
"""
PYTHON_CLIENT = """
from gpt_2_text_generation_client import Client
from gpt_2_text_generation_client.api.openai import create_completion
from gpt_2_text_generation_client.models import CompletionRequest
body = CompletionRequest(prompt="Once", max_tokens=4)
answer = create_completion.sync(client=Client(base_url="ADDRESS"), body=body)
print(answer.choices[0].finish_reason)
"""
TYPESCRIPT_FETCH = """
import { Configuration, OpenaiApi } from "./client";
const api = new OpenaiApi(new Configuration({ basePath: "ADDRESS" }));
api.createCompletion({ completionRequest: { prompt: "Once", maxTokens: 4 } })
  .then((answer) => console.log(answer.choices[0].finishReason));
"""
HEY_API = """
import { createCompletion } from "./client";
createCompletion({ baseUrl: "ADDRESS", body: { prompt: "Once", max_tokens: 4 } })
  .then(({ data }) => console.log(data!.choices[0].finish_reason));
"""
GO = """
package openapi
import ("context"; "fmt"; "testing")
func TestCall(t *testing.T) {
    made := NewConfiguration()
    made.Servers = ServerConfigurations{{URL: "ADDRESS"}}
    prompt, body := "Once", NewCompletionRequest()
    body.SetMaxTokens(4)
    body.SetPrompt(Prompt{String: &prompt})
    call := NewAPIClient(made).OpenaiAPI.CreateCompletion(context.Background())
    answer, _, err := call.CompletionRequest(*body).Execute()
    if err != nil { t.Fatal(err) }
    fmt.Println(answer.Choices[0].GetFinishReason())
}
"""
TSC = (
    "npx tsc --strict --skipLibCheck --target es2022 --module nodenext --moduleResolution nodenext "
    "--lib es2022,dom --types node --outDir js call.ts && node js/call.js"
)
NPM = "npm init -y && npm install typescript@5 @types/node"
VENV = "python3 -m venv venv && venv/bin/pip install -q"
# The jar comes from PyPI.
GENERATE = (
    f"{VENV} openapi-generator-cli && java -jar "
    "venv/lib/python*/site-packages/openapi_generator_cli/openapi-generator.jar "
    "generate -i openapi.json -o client -g"
)
# Each with its call, the file that this is written to, and what is done.
CLIENTS = {
    "python": (
        OPENAPI_PYTHON, "call.py",
        f"{GENERATE} python && venv/bin/pip install -q ./client && venv/bin/python call.py",
    ),
    "openapi-python-client": (
        PYTHON_CLIENT, "call.py",
        f"{VENV} openapi-python-client && PATH=$PWD/venv/bin:$PATH openapi-python-client generate "
        "--path openapi.json --output-path client && venv/bin/pip install -q ./client && "
        "venv/bin/python call.py",
    ),
    "typescript-fetch": (
        TYPESCRIPT_FETCH, "call.ts", f"{GENERATE} typescript-fetch && {NPM} && {TSC}",
    ),
    "hey-api": (
        HEY_API, "call.ts",
        f"{NPM} @hey-api/openapi-ts && npx openapi-ts -i openapi.json -o client && {TSC}",
    ),
    "go": (GO, "call_test.go", f"{GENERATE} go && cp call_test.go client && cd client && "
           "go test -v -run TestCall ."),
    "java": ("", "none", f"{GENERATE} java && cd client && mvn -q -B compile"),
}  # fmt: skip


def try_client(name: str, address: str, document: bytes) -> bool:
    """Whether the client compiles and its call is answered; tells which."""
    call, file_name, command = CLIENTS[name]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "openapi.json").write_bytes(document)
        Path(folder, file_name).write_text(call.replace("ADDRESS", address))
        done = subprocess.run(
            ["bash", "-c", f"set -e; {command}"], cwd=folder, capture_output=True, text=True
        )
    works = done.returncode == 0 and ("length" in done.stdout or not call)
    print(f"{name:24}{'works' if works else 'FAILS'}")
    if not works:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return works


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("address", help="of the service, with the bundled model")
    parser.add_argument("names", nargs="*", help=", ".join(CLIENTS))
    args = parser.parse_args()
    document = urllib.request.urlopen(f"{args.address}/openapi.json").read()
    works = [try_client(name, args.address, document) for name in args.names or CLIENTS]
    return 0 if all(works) else 1


if __name__ == "__main__":
    sys.exit(main())
