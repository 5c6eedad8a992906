"""Benchmark of the service against other servers, over HTTP on loopback.

    python scripts/bench.py                             # the bundled model, about ten minutes
    python scripts/bench.py --model DIR                 # any causal LM, from a folder
    python scripts/bench.py --rounds 1 --concurrency 1,8 --servers ours,baseline
    python scripts/bench.py --env QUANTIZATION=int8     # a setting of the service under test
    python scripts/bench.py --transformers-serve PATH   # pip install 'transformers[serving]'
    python scripts/bench.py --ctranslate2 PYTHON        # pip install ctranslate2 torch transformers
    python scripts/bench.py --peer llama.cpp=http://127.0.0.1:8080/v1

Servers:
    ours                `uvicorn main:app`; POST /generate, streamed
    baseline            a plain FastAPI route in this file: a float32 `pipeline(...)` behind a lock
    transformers-serve  `transformers serve --continuous-batching`; left out where it does not start
    ctranslate2         CTranslate2 with int8 weights, in a process of its own and without HTTP: as
                        many prompts in a batch as there are clients; with --ctranslate2 PYTHON,
                        that of an environment which has it
    without-speculation `ours` with SPECULATIVE_TOKENS=0; when asked for
    --peer NAME=URL     an OpenAI-compatible server that already runs: llama.cpp, vLLM ...

Method. One server at a time is under load; servers take turns within each round and concurrency.
Figures are medians over rounds. Ratios are taken within a round first, so that a machine whose
speed drifts does not distort them. Clients form a closed loop: each sends its next request once
the last one is answered. Prompts, seeds, sampling parameters and the number of new tokens are the
same everywhere as far as a server takes them. End-of-text is ignored: the servers started here
load a copy of the model whose configuration has no `eos_token_id`; peers are sent `ignore_eos`.
Responses are checked after the clock has stopped; a failed one counts as nothing but a failure,
and any failure makes the exit status 1. `spread` is how far rounds lie apart: their largest figure
less their smallest, as a part of the median.

Two more rows a server, of one client: a prompt that begins with 400 tokens which were not there
before, and a second one that begins with the same, by their times to first token; and greedy text
after a paragraph three times over, by tokens per second.

Priority. Everything started here runs at the highest one that the user may take (`nice`), since
figures fall apart on a busy machine. --real-time takes SCHED_FIFO instead: whatever else the
machine does then stops, down to a shell, for as long as the cores have work here.

The baseline answers one request at a time, so each of its clients sends one only (MIN_REQUESTS in
all at least). That flatters its latency: in a lasting loop a request waits for all other clients,
here for half of them on average. It does not stream: its time to first token is its latency.
"""

import argparse
import http.client
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("The weather today is", "Once upon a time", "She opened the door", "We went to sea")
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
MIN_REQUESTS = 8  # per server, concurrency and round
TIMEOUT_SECONDS = 300  # of a start, and of a wait for the next bytes of a response
PREFIX_TOKENS = 400
PREFIX_WORDS = (
    "a and bread by day door fire for from house in king night of old road sea the to with"
)
REPETITIVE = "The king went to the sea, and the queen went to the house by the road. " * 3
COUNT_TOLERANCE = 0.3  # of a token count by re-tokenising, where the server tells none
HEADINGS = {
    "server": "server",
    "concurrency": "concurrency",
    "tokens_per_second": "tokens/s",
    "tokens_per_second_spread": "spread",
    "requests_per_second": "requests/s",
    "latency_p50_seconds": "p50 s",
    "latency_p99_seconds": "p99 s",
    "ttft_p50_seconds": "TTFT p50 s",
    "resident_mib": "memory MiB",
    "client_cpu_cores": "client cores",
    "ratio_to_baseline": "x baseline",
}
RATIO_HEADINGS = {  # of the first server to another
    "server": "ratio",
    "concurrency": "concurrency",
    "tokens_per_second_ratio": "tokens/s",
    "ttft_p50_ratio": "TTFT p50",
    "resident_ratio": "memory",
}
TEXT_HEADINGS = {
    "server": "server",
    "first_ttft_seconds": f"{PREFIX_TOKENS} new tokens: TTFT s",
    "second_ttft_seconds": "again: TTFT s",
    "second_ttft_ratio": "again / new",
    "repetitive_tokens_per_second": "repetitive: tokens/s",
}
# Of the processor: what kernels are chosen by.
CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
OURS = ("ours", "without-speculation")
INTERNAL = ("serve_baseline", "run_ctranslate2")  # options that nobody types
Row = dict[str, Any]


# The contestants


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@dataclass
class Server:
    """One contestant; without a command it already runs."""

    name: str
    path: str
    fields: Row  # of every request; "seed" is replaced by the request's own
    command: list[str] = field(default_factory=list)  # "PORT" in it stands for the port
    env: dict[str, str] = field(default_factory=dict)
    ready_path: str = "/ready"
    is_batching: bool = True
    is_in_process: bool = False  # asked over pipes, not HTTP
    address: str = field(default_factory=free_address)
    process: subprocess.Popen[bytes] | None = None


def contestants(args: argparse.Namespace, model: str) -> Iterator[Server]:
    """The servers that were asked for, in the order in which they take turns."""
    native = SAMPLING | {"max_new_tokens": args.max_new_tokens}
    openai = {"max_tokens": args.max_new_tokens, "stream": True}
    if "ours" in args.servers:
        fields = native | {"seed": 0, "stream": True}
        command = [sys.executable, "-m", "uvicorn", "main:app", "--port", "PORT", "--no-access-log"]
        env = {"MODEL_NAME": model} | dict(pair.split("=", 1) for pair in args.env)
        yield Server("ours", "/generate", fields, command, env)
        if "without-speculation" in args.servers:
            env = env | {"SPECULATIVE_TOKENS": "0"}
            yield Server("without-speculation", "/generate", fields, command, env)
    if "baseline" in args.servers:
        command = [sys.executable, __file__, "--serve-baseline", "PORT", "--model", model]
        server = Server("baseline", "/generate", native, command, is_batching=False)
        server.ready_path = "/openapi.json"
        yield server
    if "transformers-serve" in args.servers:
        # Left alone it takes 60% of the free memory for its cache: here, two blocks (of 256
        # tokens) a client. It refuses top_k and do_sample in a request, generation_config.json
        # holds them; and a seed would reset the one generator that all its requests share.
        fields = openai | {"model": model, "temperature": 1.0, "top_p": SAMPLING["top_p"]}
        dtype = "bfloat16" if re.search("avx512_bf16|amx_bf16", cpu_info()) else "auto"
        options = f"--continuous-batching --cb-num-blocks {max(32, 2 * max(args.concurrency))}"
        options += f" --dtype {dtype} --host 127.0.0.1 --port PORT"
        cli = os.path.abspath(shutil.which(args.transformers_serve) or args.transformers_serve)
        command = [cli, "serve", *options.split(), model]
        path = "/v1/completions"
        yield Server("transformers-serve", path, fields, command, ready_path="/health")
    if args.ctranslate2:
        command = [args.ctranslate2, __file__, "--run-ctranslate2", "--model", model]
        yield Server("ctranslate2", "", SAMPLING, command, is_in_process=True)
    for name, url in (pair.split("=", 1) for pair in args.peer):
        models = json.loads(get(f"{url}/models") or sys.exit(f"{name}: no answer from {url}"))
        fields = openai | SAMPLING | {"seed": 0, "model": models["data"][0]["id"]}
        fields |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        address = urlsplit(url)
        yield Server(name, f"{address.path}/completions", fields, address=address.netloc)


def baseline_app(model: str) -> Any:
    """What a plain FastAPI service does: one pipeline, one request at a time."""
    import torch
    from fastapi import FastAPI
    from transformers import pipeline

    generator = pipeline("text-generation", model=model, dtype=torch.float32)
    pad_token_id = generator.tokenizer.eos_token_id
    lock = threading.Lock()
    app = FastAPI()

    @app.post("/generate")
    def generate(body: Row) -> dict[str, str]:
        prompt = body.pop("prompt")
        is_greedy = body.get("temperature") == 0
        if is_greedy:
            del body["temperature"]  # a pipeline takes none that is 0
        with lock:
            outputs = generator(prompt, do_sample=not is_greedy, pad_token_id=pad_token_id, **body)
        return {"generated_text": outputs[0]["generated_text"], "model_name": Path(model).name}

    return app


def serve_baseline(port: int, model: str) -> None:
    """Serve it until the process ends."""
    import uvicorn

    uvicorn.run(baseline_app(model), host="127.0.0.1", port=port, log_level="warning")


def run_ctranslate2(model: str) -> None:
    """Convert the model to int8, then answer lines of standard input: each names batches of
    prompts, in tokens, and is answered with the seconds and the numbers of new tokens of each."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory(prefix="ctranslate2-") as folder:
        TransformersConverter(model).convert(folder, quantization="int8", force=True)
        generator = ctranslate2.Generator(
            folder, compute_type="int8", inter_threads=1, intra_threads=num_cores()
        )
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ctranslate2.set_random_seed(asked["seed"] + 1)
        seconds, num_new_tokens = [], []
        for prompts in asked["batches"]:
            started = time.perf_counter()
            results = generator.generate_batch(
                prompts,
                min_length=asked["max_new_tokens"],
                max_length=asked["max_new_tokens"],
                sampling_temperature=asked["temperature"] or 1.0,
                sampling_topk=asked["top_k"] if asked["temperature"] else 1,
                sampling_topp=asked["top_p"],
                end_token=[],
                include_prompt_in_result=False,
            )
            seconds.append(time.perf_counter() - started)
            num_new_tokens.append([len(result.sequences_ids[0]) for result in results])
        print(json.dumps({"seconds": seconds, "num_new_tokens": num_new_tokens}), flush=True)


def raise_priority(is_real_time: bool) -> str:
    """Takes the highest priority that the user may have, for what is started from here on too:
    says which."""
    try:
        if is_real_time:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            return "SCHED_FIFO"
        return f"nice {os.nice(-20)}"
    except (AttributeError, OSError) as error:
        if is_real_time:
            sys.exit(f"--real-time is not allowed here: {error}")
        return "ordinary"


# Starting and stopping them


def without_eos(model: str, parent: Path) -> Path:
    """A copy of the model, linked, in which no token ends the text and sampling is the default."""
    copy = parent / Path(model).resolve().name
    copy.mkdir()
    for source in Path(model).resolve().iterdir():
        (copy / source.name).symlink_to(source.resolve())
    edits: Row = {"config.json": {}, "generation_config.json": SAMPLING | {"do_sample": True}}
    for name, fields in edits.items():
        config = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        (copy / name).unlink(missing_ok=True)
        (copy / name).write_text(json.dumps(config | fields | {"eos_token_id": None}))
    return copy


def get(url: str) -> bytes:
    """The body of a 200; nothing of any other answer, or of none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            return bytes(response.read())
    except (OSError, http.client.HTTPException):
        return b""


def start(server: Server, log: Path) -> bool:
    """Start the server; True once it is ready, False with its log's end printed if it never is."""
    if not server.command:
        return True
    port = server.address.split(":")[1]
    command = [port if part == "PORT" else part for part in server.command]
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | server.env
    with log.open("wb") as output:
        try:  # in a process group of its own, which stop() ends as one
            server.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE if server.is_in_process else None,
                stdout=subprocess.PIPE if server.is_in_process else output,
                stderr=output,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            output.write(str(error).encode())
    if server.is_in_process and server.process and server.process.stdout:
        for line in server.process.stdout:  # until it ends, if it never is ready
            if line == b"ready\n":
                return True
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while server.process and server.process.poll() is None and time.monotonic() < deadline:
        if get(f"http://{server.address}{server.ready_path}"):
            return True
        time.sleep(0.2)
    print(f"{server.name} did not start. {' '.join(command)}, the end of its log:")
    print("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
    return False


def stop(server: Server) -> None:
    if server.process:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        with server.process:  # waits for it, and closes its pipes
            pass


# The client: threads and http.client, which cost a third of the CPU time of a larger HTTP library,
# and that comes out of the cores the servers need. While the clock runs, a response is parsed up
# to its first text only.


@dataclass
class Reply:
    prompt: str
    status: int = 0
    body: bytes = b""
    ttft_seconds: float = 0.0
    latency_seconds: float = 0.0
    error: str = ""


def send(server: Server, prompt: str, seed: int) -> Reply:
    """One request on a connection of its own; what goes wrong is told in `error`."""
    reply = Reply(prompt)
    fields = server.fields | {"prompt": prompt}
    body = json.dumps(fields | {"seed": seed} if "seed" in fields else fields)
    started = time.perf_counter()
    with closing(http.client.HTTPConnection(server.address, timeout=TIMEOUT_SECONDS)) as connection:
        try:
            connection.request("POST", server.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            reply.status = response.status
            while part := response.read1(65536):
                reply.body += part
                if not reply.ttft_seconds and any(map(text_of, events(reply.body))):
                    reply.ttft_seconds = time.perf_counter() - started
        except (OSError, http.client.HTTPException, ValueError) as error:
            reply.error = repr(error)
    reply.latency_seconds = time.perf_counter() - started
    reply.ttft_seconds = reply.ttft_seconds or reply.latency_seconds
    return reply


def events(body: bytes) -> list[Row]:
    """The server-sent events that have arrived whole."""
    data = (line[5:].strip() for line in body.split(b"\n")[:-1] if line.startswith(b"data:"))
    return [json.loads(item) for item in data if item and item != b"[DONE]"]


def text_of(event: Row) -> str:
    """The text that a native or an OpenAI event adds."""
    choices = event.get("choices", [event])
    return (choices[0].get("text") or "") if choices else ""


def problem(reply: Reply, max_new_tokens: int, tokenizer: Tokenizer) -> str:
    """What is wrong with the reply; "" when nothing is."""
    tail = reply.body[-200:].decode(errors="replace")
    if reply.error or reply.status != 200:
        return reply.error or f"status {reply.status}: {tail}"
    try:
        parts = events(reply.body) or [json.loads(reply.body)]
    except ValueError:
        return f"neither events nor JSON: {tail}"
    if usages := [part["usage"] for part in parts if part.get("usage")]:
        count = usages[-1]["completion_tokens"]
        return "" if count == max_new_tokens else f"{count} new tokens, not {max_new_tokens}"
    text = "".join(map(text_of, parts))
    if "choices" not in parts[0]:  # a native route: its last event holds the whole text
        whole = str(parts[-1].get("generated_text"))
        if not whole.startswith(reply.prompt):
            return f"no generated_text that begins with the prompt: {tail}"
        text = whole.removeprefix(reply.prompt)
    count = len(tokenizer.encode(text, add_special_tokens=False).ids)
    is_close = abs(count - max_new_tokens) <= COUNT_TOLERANCE * max_new_tokens
    return "" if is_close else f"about {count} new tokens, not {max_new_tokens}: {tail}"


# Measuring


def measure(
    server: Server, concurrency: int, num_requests: int, seed: int, args: argparse.Namespace
) -> Row:
    """Figures of one closed loop of clients; its failures are printed."""
    prompts = random.Random(seed).choices(PROMPTS, k=num_requests)
    started, cpu_started = time.perf_counter(), time.process_time()
    if server.is_in_process:
        replies, seconds = run_batches(server, prompts, concurrency, seed, args)
    else:
        replies = send_all(server, prompts, concurrency, seed)
        seconds = time.perf_counter() - started
    cpu_cores = (time.process_time() - cpu_started) / (time.perf_counter() - started)
    resident_mib = tree_resident_mib(server.process.pid) if server.process else None
    problems = [problem(reply, args.max_new_tokens, args.tokenizer) for reply in replies]
    good = [reply for reply, wrong in zip(replies, problems, strict=True) if not wrong]
    if failures := [wrong for wrong in problems if wrong]:
        failed = f"{len(failures)} of {num_requests} requests FAILED"
        print(f"{server.name} at {concurrency}: {failed}, the first: {failures[0]}")
    return {
        "server": server.name,
        "concurrency": concurrency,
        "tokens_per_second": len(good) * args.max_new_tokens / seconds,
        "requests_per_second": len(good) / seconds,
        "latency_p50_seconds": percentile(0.50, [reply.latency_seconds for reply in good]),
        "latency_p99_seconds": percentile(0.99, [reply.latency_seconds for reply in good]),
        "ttft_p50_seconds": percentile(0.50, [r.ttft_seconds for r in good if r.ttft_seconds]),
        "resident_mib": resident_mib,
        "client_cpu_cores": cpu_cores,
        "num_requests": num_requests,
        "num_failures": len(failures),
    }


def send_all(server: Server, prompts: list[str], concurrency: int, seed: int) -> list[Reply]:
    """The replies of a closed loop of clients."""
    with ThreadPoolExecutor(concurrency) as clients:
        try:
            seeds = range(seed, seed + len(prompts))
            return list(clients.map(send, repeat(server), prompts, seeds))
        except KeyboardInterrupt:  # the clients would wait for their answers
            stop(server)
            raise


def run_batches(
    server: Server, prompts: list[str], batch_size: int, seed: int, args: argparse.Namespace
) -> tuple[list[Reply], float]:
    """What a server without HTTP makes of the prompts, batch by batch, and the seconds of all.

    A reply's body tells the number of tokens, as OpenAI's usage does; no time to first token.
    """
    assert server.process
    assert server.process.stdin
    assert server.process.stdout
    tokens = [args.tokenizer.encode(prompt).tokens for prompt in prompts]
    batches = [tokens[at : at + batch_size] for at in range(0, len(tokens), batch_size)]
    asked = server.fields | {"seed": seed, "batches": batches}
    asked["max_new_tokens"] = args.max_new_tokens
    with suppress(BrokenPipeError):  # then there is no answer either
        server.process.stdin.write(json.dumps(asked).encode() + b"\n")
    line = server.process.stdout.readline()
    if not line:
        return [Reply(prompt, error="it ended") for prompt in prompts], math.inf
    answer = json.loads(line)
    replies = []
    for seconds, counts in zip(answer["seconds"], answer["num_new_tokens"], strict=True):
        for count in counts:
            body = json.dumps({"usage": {"completion_tokens": count}}).encode()
            replies.append(Reply("", status=200, body=body, latency_seconds=seconds))
    return replies, sum(answer["seconds"])


def measure_texts(server: Server, round_index: int, args: argparse.Namespace) -> Row:
    """Figures of a beginning that two prompts share, and of text that repeats itself."""
    words = random.Random(round_index).choices(PREFIX_WORDS.split(), k=2 * PREFIX_TOKENS)
    prefix = args.tokenizer.decode(args.tokenizer.encode(" ".join(words)).ids[:PREFIX_TOKENS])
    row: Row = {"server": server.name, "concurrency": 1, "num_failures": 0}
    row |= dict.fromkeys(list(TEXT_HEADINGS)[1:])
    if server.name in OURS:  # its native routes take 500 characters
        fields = SAMPLING | {"max_tokens": args.max_new_tokens, "stream": True, "seed": 0}
        fields["stream_options"] = {"include_usage": True}
        server = replace(server, path="/v1/completions", fields=fields)

    def is_good(reply: Reply) -> bool:
        if wrong := problem(reply, args.max_new_tokens, args.tokenizer):
            print(f"{server.name}, text {row['num_failures'] + 1}: FAILED, {wrong}")
            row["num_failures"] += 1
        return not wrong

    if server.is_batching and not server.is_in_process:  # else nothing is streamed
        first, second = (send(server, prefix + end, 0) for end in (" so", " then"))
        if is_good(first) and is_good(second):
            row["first_ttft_seconds"] = first.ttft_seconds
            row["second_ttft_seconds"] = second.ttft_seconds
            row["second_ttft_ratio"] = second.ttft_seconds / first.ttft_seconds
    greedy = replace(server, fields=server.fields | {"temperature": 0.0})
    if server.is_in_process:
        (reply,), _ = run_batches(greedy, [REPETITIVE], 1, 0, args)
    else:
        reply = send(greedy, REPETITIVE, 0)
    if is_good(reply):
        row["repetitive_tokens_per_second"] = args.max_new_tokens / reply.latency_seconds
    return row


def percentile(fraction: float, values: list[float]) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    return sorted(values)[math.ceil(fraction * len(values)) - 1] if values else None


def tree_resident_mib(pid: int) -> float | None:
    """Resident memory of a process and its descendants; None where there is no /proc."""
    try:
        kib = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        lists = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return None
    children = [tree_resident_mib(int(child)) or 0.0 for child in " ".join(lists).split()]
    return sum(children) + (int(kib[1]) / 1024 if kib else 0.0)


def measure_all(
    servers: list[Server], args: argparse.Namespace
) -> tuple[list[Row], list[Row], list[Row]]:
    """Medians by server and concurrency, medians of the first server's ratios to the others, and
    those of `measure_texts`."""
    for server in servers:  # warm-up
        for concurrency in args.concurrency:
            num_requests = concurrency if server.is_batching else 1
            if measure(server, concurrency, num_requests, 0, args)["num_failures"]:
                sys.exit(f"{server.name} fails in the warm-up: not measured")
    rows, ratios, texts = [], [], []
    for round_index in range(args.rounds):
        for concurrency in args.concurrency:
            cell: list[Row] = []
            for server in servers:
                per_client = args.requests_per_client if server.is_batching else 1
                num_requests = max(MIN_REQUESTS, concurrency * per_client)
                row = measure(server, concurrency, num_requests, 1000 * (round_index + 1), args)
                done = f"{server.name} at {concurrency}: {row['tokens_per_second']:.1f} tokens/s"
                print(f"round {round_index + 1} of {args.rounds}, {done}", file=sys.stderr)
                cell.append(row)
            for row in cell:
                base = [other for other in cell if other["server"] == "baseline"] or [{}]
                row["ratio_to_baseline"] = ratio(row, base[0], "tokens_per_second")
            rows += cell
            ratios += [ratios_of(cell[0], other) for other in cell[1:]]
        texts += [measure_texts(server, round_index, args) for server in servers]
    return medians(rows), medians(ratios), medians(texts)


def ratio(row: Row, other: Row, figure: str) -> float | None:
    """What the figure of row is in multiples of other's; None where either is not known."""
    return row[figure] / other[figure] if row.get(figure) and other.get(figure) else None


def ratios_of(row: Row, other: Row) -> Row:
    return {
        "server": f"{row['server']} / {other['server']}",
        "concurrency": row["concurrency"],
        "tokens_per_second_ratio": ratio(row, other, "tokens_per_second"),
        "ttft_p50_ratio": ratio(row, other, "ttft_p50_seconds"),
        "resident_ratio": ratio(row, other, "resident_mib"),
    }


def medians(rows: list[Row]) -> list[Row]:
    """One row for each concurrency and server: medians of figures, sums of numbers of requests."""
    cells: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["concurrency"], row["server"]), []).append(row)
    results = []
    for (concurrency, server), cell in cells.items():
        result: Row = {"server": server, "concurrency": concurrency}
        for name in list(cell[0])[2:]:
            known = [row[name] for row in cell if row[name] is not None]
            combine = sum if name.startswith("num_") else median
            result[name] = combine(known) if known else None
            if name == "tokens_per_second" and known:
                result["tokens_per_second_spread"] = (max(known) - min(known)) / median(known)
        results.append(result)
    return results


# Reporting


def print_table(rows: list[Row], headings: dict[str, str]) -> None:
    """The rows in Markdown, to three digits; a figure that is not known is a dash."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
        return "-" if value is None else str(value)

    lines = [list(headings.values()), ["---:"] * len(headings)]
    lines += [[text(row[name]) for name in headings] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("|", " | ".join(map(str.rjust, line, widths)), "|")
    print()


def num_cores() -> int:
    """The cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def cpu_info() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def hardware() -> Row:
    names = re.findall(r"model name\s*: (.*)", cpu_info())
    return {
        "cpu_model": names[0] if names else platform.machine(),
        "num_cores": num_cores(),
        "cpu_flags": " ".join(flag for flag in CPU_FLAGS if re.search(rf"\b{flag}\b", cpu_info())),
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    """The benchmark from end to end; 1 when a request failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "gpt2-tales"), metavar="DIR")
    parser.add_argument("--servers", default="ours,baseline,transformers-serve")
    parser.add_argument("--concurrency", default="1,8,32,64")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--requests-per-client", default=2, type=int)
    parser.add_argument("--max-new-tokens", default=50, type=int)
    parser.add_argument("--env", default=[], nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--transformers-serve", default="transformers", metavar="PATH")
    parser.add_argument("--ctranslate2", metavar="PYTHON")
    parser.add_argument("--real-time", action="store_true")
    parser.add_argument("--run-ctranslate2", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", default=[], action="append", metavar="NAME=URL")
    parser.add_argument("--serve-baseline", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_baseline:
        serve_baseline(args.serve_baseline, args.model)
        return 0
    if args.run_ctranslate2:
        run_ctranslate2(args.model)
        return 0

    setup = {name: value for name, value in vars(args).items() if name not in INTERNAL}
    setup["hardware"] = hardware() | {"priority": raise_priority(args.real_time)}
    args.servers = args.servers.split(",")
    args.concurrency = [int(number) for number in args.concurrency.split(",")]
    servers: list[Server] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        model_dir = without_eos(args.model, Path(folder))
        args.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        try:
            for server in contestants(args, str(model_dir)):
                servers.append(server)
                if not start(server, Path(folder) / f"{server.name}.log"):
                    if server.name != "transformers-serve":
                        return 1
                    print("It is left out.")
                    stop(servers.pop())
            results, ratios, texts = measure_all(servers, args)
        finally:
            for server in servers:
                stop(server)
    print("\n" + ", ".join(f"{name} {value}" for name, value in setup["hardware"].items()) + "\n")
    print_table(results, HEADINGS)
    if ratios:
        print_table(ratios, RATIO_HEADINGS)
    print_table(texts, TEXT_HEADINGS)
    print(json.dumps(setup | {"results": results, "ratios": ratios, "texts": texts}))
    return int(any(row["num_failures"] for row in results + texts))


if __name__ == "__main__":
    sys.exit(main())
