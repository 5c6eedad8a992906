"""Makes calls with other people's clients, each in an environment of its own: which of them work?

    python scripts/clients.py                   # all of them
    python scripts/clients.py openai jdk        # these

The calls are in scripts/calls/; docs/clients.md has the results. Starts a service with the bundled
model, which it gives a chat template. Needs a network for what it installs into temporary folders,
and for some of the clients node, Chromium, java, mvn, go, or prometheus.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CALLS = ROOT / "scripts" / "calls"
MODEL = "gpt2-tales"
CHAT_TEMPLATE = "{% for each in messages %}{{ each.content }}\n\n{% endfor %}"

VENV = f"{sys.executable} -m venv venv && venv/bin/pip install -q"
PYTHON = "venv/bin/python call.py"
NPM = "npm init -y > npm.log && npm install --no-fund --no-audit >> npm.log"
# The jar comes from PyPI.
GENERATE = (
    f"{VENV} openapi-generator-cli && java -jar "
    "venv/lib/python*/site-packages/openapi_generator_cli/openapi-generator.jar "
    "generate -i openapi.json -o client > generate.log -g"
)
GENERATOR = "venv/bin/pip list | grep openapi-generator-cli"
TSC = (
    "npx tsc --strict --skipLibCheck --target es2022 --module nodenext --moduleResolution nodenext "
    "--lib es2022,dom --types node --outDir js call.ts && node js/call.js"
)
# Of each client: its call, the name under which that is wanted, and what is done. The last line
# that this prints is told.
CLIENTS = {
    "openai": ("openai.py", "call.py", f"{VENV} openai && {PYTHON}"),
    "openai-node": ("openai.mjs", "openai.mjs", f"{NPM} openai && node openai.mjs"),
    "openai-chromium": (
        "chromium.py", "call.py",
        f"{NPM} openai && cp {CALLS}/openai.mjs . && {VENV} playwright && {PYTHON}",
    ),
    "jdk": ("Jdk.java", "Jdk.java", "java Jdk.java"),
    "langchain-openai": (
        "langchain-openai.py", "call.py", f"{VENV} langchain-openai && {PYTHON}",
    ),
    "litellm": ("litellm.py", "call.py", f"{VENV} litellm && {PYTHON}"),
    "llama-index": (
        "llama-index.py", "call.py", f"{VENV} llama-index-llms-openai-like && {PYTHON}",
    ),
    "llm": ("llm.sh", "call.sh", f"{VENV} llm && source call.sh"),
    "lm-eval": ("lm-eval.sh", "call.sh", f"{VENV} 'lm-eval[api]' && source call.sh"),
    "guidellm": ("guidellm.sh", "call.sh", f"{VENV} guidellm && source call.sh"),
    "promptfoo": ("promptfoo.sh", "call.sh", f"{NPM} promptfoo && source call.sh"),
    "prometheus": ("prometheus.sh", "call.sh", "source call.sh"),
    # Made from the OpenAPI document.
    "openapi-generator-python": (
        "openapi-generator.py", "call.py",
        f"{GENERATE} python && venv/bin/pip install -q ./client && {PYTHON} && {GENERATOR}",
    ),
    "openapi-python-client": (
        "openapi-python-client.py", "call.py",
        f"{VENV} openapi-python-client && PATH=$PWD/venv/bin:$PATH openapi-python-client generate "
        f"--path openapi.json --output-path client && venv/bin/pip install -q ./client && {PYTHON} "
        "&& venv/bin/openapi-python-client --version",
    ),
    "openapi-generator-typescript": (
        "typescript-fetch.ts", "call.ts",
        f"{GENERATE} typescript-fetch && {NPM} typescript@5 @types/node && {TSC} && {GENERATOR}",
    ),
    "openapi-generator-java": (
        "CallTest.java", "CallTest.java",
        f"{GENERATE} java && mv CallTest.java client/src/test/java && cd client && "
        f"mvn -q -B test -Dtest=CallTest && cd .. && {GENERATOR}",
    ),
    "openapi-generator-go": (
        "openapi-generator_test.go", "call_test.go",
        f"{GENERATE} go && mv call_test.go client && cd client && go test -run TestCall . && "
        "cd .. && " + GENERATOR,
    ),
    "hey-api": (
        "hey-api.ts", "call.ts",
        f"{NPM} typescript@5 @types/node @hey-api/openapi-ts && npx openapi-ts -i openapi.json "
        f"-o client && {TSC} && npm ls @hey-api/openapi-ts | tail -2",
    ),
}  # fmt: skip


class Service(NamedTuple):
    """address: without a slash at its end. model_folder: of the model that is served. page_port:
    pages from there may call the service."""

    address: str
    model_folder: Path
    page_port: int


@contextmanager
def service() -> Iterator[Service]:
    """A service in a process of its own until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        port, page_port = (each.getsockname()[1] for each in (one, other))
    with tempfile.TemporaryDirectory() as folder:
        model_folder = Path(folder, MODEL)
        shutil.copytree(ROOT / MODEL, model_folder)
        (model_folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        origin = f"http://127.0.0.1:{page_port}"
        settings = {"MODEL_NAME": str(model_folder), "CORS_ORIGINS": origin}
        command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
        command += ["--log-level", "warning"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.DEVNULL
        )
        try:
            address = f"http://localhost:{port}"
            wait_for(f"{address}/ready")
            yield Service(address, model_folder, page_port)
        finally:
            process.terminate()
            process.wait()


def wait_for(address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address).close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(address)


def try_client(name: str, service: Service) -> bool:
    """Whether the client can be made and its call is answered; prints which."""
    call, file_name, command = CLIENTS[name]
    environment = os.environ | {
        "ADDRESS": service.address, "MODEL": MODEL, "FOLDER": str(service.model_folder),
        "PAGE_PORT": str(service.page_port),
    }  # fmt: skip
    started_seconds = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with urllib.request.urlopen(f"{service.address}/openapi.json") as document:
            Path(folder, "openapi.json").write_bytes(document.read())
        shutil.copyfile(CALLS / call, Path(folder, file_name))
        done = subprocess.run(
            ["bash", "-c", f"set -e -o pipefail; {command}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    told = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else ["FAILS"]
    print(f"{name:30}{time.monotonic() - started_seconds:5.0f} s  {' '.join(told)}", flush=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLIENTS))
    args = parser.parse_args()
    with service() as served:
        works = [try_client(name, served) for name in args.names or CLIENTS]
    return 0 if all(works) else 1


if __name__ == "__main__":
    sys.exit(main())
