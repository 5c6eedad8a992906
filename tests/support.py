"""What several test files need: services in threads and processes, and words for the engine.

Nothing here imports main.py before it is asked to, so that tests of the engine load no service.
"""

import asyncio
import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TokenizersBackend,
)
from transformers.utils import logging as transformers_logging

from engine import (
    Delta,
    Engine,
    EngineRequest,
    Prompt,
    SamplingParams,
    TextReading,
    TokenMask,
)
from engine.request import Sequence
from tests.forked import ROOT, Forked, can_fork

NAME = "gpt2-tales"
FOLDER = ROOT / NAME
PROMPT = "Once upon a time"

# --- The service --------------------------------------------------------------------------------


def new_client(**options: Any) -> httpx.Client:
    """A client of the app in this process; or of the service at SERVICE_ADDRESS, for which
    test_ray.py runs the tests marked `contract` again."""
    if address := os.environ.get("SERVICE_ADDRESS"):
        client = httpx.Client(base_url=address, timeout=120, follow_redirects=True)
        atexit.register(client.close)
        return client
    import main

    return TestClient(main.app, **options)


@contextmanager
def serve_in_thread(app: Any, port: int = 0, root_path: str = "") -> Iterator[str]:
    """The address of a uvicorn that serves app until the end of the block."""
    config = uvicorn.Config(app, port=0, root_path=root_path, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Served:
    """A service in a process of its own, and what it has written."""

    def __init__(self, process: subprocess.Popen[str] | Forked, address: str):
        self.process = process
        self.address = address
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout
        self.lines.extend(self.process.stdout)  # extends as the lines come

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers=headers, timeout=60)


@contextmanager
def served(
    *arguments: str,
    port: int = 0,
    folder: Path = ROOT,
    through: tuple[str, ...] = (),
    ready_seconds: float = 60,
    **settings: str,
) -> Iterator[Served]:
    """A uvicorn, on a free port if none is given, ended with SIGTERM unless it has ended before.

    through: a command that is given that of the service as its arguments, and becomes it."""
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]
    command = ["-m", "uvicorn", "main:app", "--port", str(port), *arguments]
    environment = os.environ | settings
    process: subprocess.Popen[str] | Forked
    if folder == ROOT and not through and "--reload" not in arguments and can_fork(settings):
        process = Forked(command, environment)
    else:
        process = subprocess.Popen(
            [*through, sys.executable, *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert process.stdout
    service = Served(process, f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: is_ready(service), ready_seconds)
        yield service
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        service.reader.join()
        process.stdout.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def redis_server(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A redis-server until the end of the block; `.args[2]` is its port."""
    if not (server := shutil.which("redis-server")):
        assert not os.environ.get("CI"), "redis-server is not installed"
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_listening(port))
        yield process
    finally:
        process.kill()
        process.wait()


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def is_ready(service: Served) -> bool:
    assert service.process.poll() is None, "".join(service.lines)
    try:
        return httpx.get(f"{service.address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.01)


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, lines))


def refused_fields(response: httpx.Response) -> list[list[str | int]]:
    """Where a 422 says that the request is wrong, after a look at its shape."""
    assert response.status_code == 422
    assert set(response.json()) == {"detail"}
    assert all(set(problem) == {"loc", "msg", "type"} for problem in response.json()["detail"])
    return [problem["loc"] for problem in response.json()["detail"]]


def stream(
    address: str, body: Any, path: str = "/generate"
) -> AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", address + path, json=body, timeout=60)


def events(body: str) -> list[tuple[str | None, Any]]:
    """(name, content) of the events of a stream, whose framing is checked on the way."""
    *blocks, end = body.split("\n\n")
    assert end == ""
    parsed = []
    for block in blocks:
        *names, data = block.split("\n")
        assert len(names) <= 1
        assert all(name.startswith("event: ") for name in names)
        assert data.startswith("data: ")
        name = names[0].removeprefix("event: ") if names else None
        parsed.append((name, json.loads(data.removeprefix("data: "))))
    return parsed


def read_all(chunks: Iterator[str]) -> tuple[str, bool]:
    """The rest of a body, and whether it came to a proper end."""
    got = ""
    try:
        for chunk in chunks:
            got += chunk
    except httpx.RemoteProtocolError:
        return got, False
    return got, True


def fail(*_: Any, **__: Any) -> Any:
    """A model's forward pass that is broken on purpose."""
    raise RuntimeError("injected")


# --- The engine ---------------------------------------------------------------------------------

transformers_logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)

LONG_PROMPT = "The old king had three sons, and the youngest of them was called a fool by all. " * 5


def ids(text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def token(text: str) -> int:
    """The id of the one token that text is."""
    (token_id,) = ids(text)
    return token_id


def byte_fallback_tokenizer() -> Any:
    """Small, and spells what it has no word for byte by byte, as Llama 2's does."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁one", "▁two", "▁three", "▁the", "Ġ", *"abcdefghijklmnopqrstuvwxyz."]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return TokenizersBackend(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def load(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype)


def tiny_llama(head_dim: int = 8, max_position_embeddings: int = 256) -> Any:
    """Random weights, the same at every call; four query heads for each of the two of keys."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=head_dim,
        max_position_embeddings=max_position_embeddings, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def sequences(
    params: SamplingParams = SamplingParams(),  # noqa: B008
    *,
    prompt: list[int] | None = None,
    output: tuple[int, ...] = (),
    count: int = 1,
    seed: int = 0,
    streams: bool = False,
    reading: TextReading | None = None,
    client: str = "",
) -> list[Sequence]:
    """The sequences of one request, as the engine makes them."""
    read = Prompt(prompt or [1], reading)
    request = EngineRequest(read, params, streams, loop=None, client=client)
    seqs = [Sequence(request, index, seed) for index in range(count)]
    for seq in seqs:
        seq.output_token_ids += output
    return seqs


async def complete(engine: Engine, request: EngineRequest) -> list[Delta]:
    """Every delta of a request, of one that does not stream one a sequence."""
    return [delta async for delta in engine.stream(request)]


async def deltas(
    engine: Engine, prompt: str, *, n: int = 1, streams: bool = True, **params: Any
) -> list[Delta]:
    """Every delta of one request, as they come."""
    request = engine.submit(ids(prompt), SamplingParams(**params), num_sequences=n, streams=streams)
    return await complete(engine, request)


async def answer(engine: Engine, prompt: str, **params: Any) -> list[Delta]:
    """Every sequence of one request as one delta; what was streamed is put together."""
    answers: dict[int, Delta] = {}
    for delta in await deltas(engine, prompt, **{"streams": False, **params}):
        old = answers.get(delta.index, Delta(delta.index, "", [], [], None))
        answers[delta.index] = Delta(
            delta.index,
            old.text + delta.text,
            old.token_ids + delta.token_ids,
            old.logprobs + delta.logprobs,
            delta.finish_reason,
        )
    return [answers[index] for index in sorted(answers)]


def run(*requests: Coroutine[Any, Any, Any]) -> list[Any]:
    """What the requests give that run at the same time; an error in an error's place."""

    async def together() -> list[Any]:
        async with asyncio.timeout(60):
            return await asyncio.gather(*requests, return_exceptions=True)

    return asyncio.run(together())


def one(engine: Engine, prompt: str, **params: Any) -> Delta:
    """The only sequence of a request that runs alone."""
    ((delta,),) = run(answer(engine, prompt, **params))
    return delta


async def until(condition: Callable[[], Any]) -> None:
    """The same as `wait_until`, on an event loop."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def saying(*token_ids: int) -> dict[str, Any]:
    """Parameters under which the model says these tokens, all different, in turn, for ever.

    Each time one is said, it falls behind the others.
    """
    count = len(token_ids)
    bias = {token_id: 1e5 + 200.0 * (count - i) for i, token_id in enumerate(token_ids)}
    return {"temperature": 0, "logit_bias": bias, "frequency_penalty": 200.0 * (count + 1)}


def among(*texts: str) -> dict[int, float]:
    """A bias under which the model says nothing but these tokens, in whatever order."""
    return {token(text): 100.0 for text in texts}


def greedy(model: Any, prompt: str, num_tokens: int) -> list[int]:
    """What transformers generates, end-of-text included."""
    prompt_ids = torch.tensor([ids(prompt)])
    generated = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return generated[0, prompt_ids.shape[1] :].tolist()


def byte_tokens(text: str) -> list[int]:
    """The tokens of the single bytes of text."""
    alphabet = tokenizer.backend_tokenizer.get_vocab()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [alphabet[characters[byte]] for byte in text.encode()]


class OneOf:
    """The engine's Constraint and TextMatcher: one of these texts, as token ids."""

    def __init__(self, *texts: list[int], vocab_size: int = 8192):
        self.texts = texts
        self.vocab_size = vocab_size
        self.threads: set[str] = set()  # that have asked for masks

    def start(self) -> "OneOf":
        return self

    def _rest(self, token_ids: SequenceOf[int]) -> list[list[int]]:
        length = len(token_ids)
        return [text[length:] for text in self.texts if text[:length] == list(token_ids)]

    def mask(self, token_ids: SequenceOf[int]) -> TokenMask:
        self.threads.add(threading.current_thread().name.partition("_")[0])
        rest = self._rest(token_ids)
        assert rest, "the text left the constraint"
        bias = torch.full((self.vocab_size,), -torch.inf)
        bias[[text[0] for text in rest if text]] = 0
        return TokenMask(bias, [] in rest)

    def is_complete(self, token_ids: SequenceOf[int]) -> bool:
        return self._rest(token_ids) == [[]]
