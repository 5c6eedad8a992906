"""What is counted, under vLLM's names where it has the same figure: its dashboards carry over."""

from functools import partial

import torch
import transformers
from prometheus_client import Counter, Gauge, Histogram, Info, generate_latest

from backends.base import About, Backend
from engine import StepStats

REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

HTTP_REQUESTS = Counter(
    "http_requests", "Answered requests, by route template.", ["method", "route", "status"]
)
FILTER_HITS = Counter(
    "filter_hits", "Forbidden words found: prompts refused, texts rolled back.", ["where"]
)
FAILED_REQUESTS = Counter(
    "failed_requests", "Admitted requests that ended with an error, also in a stream.", ["reason"]
)
QUEUE_REFUSALS = Counter("queue_refusals", "Requests refused because the queue was full.")
CLOSED_CONNECTIONS = Counter(
    "closed_connections", "Connections closed that their clients kept too long.", ["reason"]
)
RATE_LIMIT_REFUSALS = Counter("rate_limit_refusals", "Requests refused with 429.", ["limit"])
BUILD = Info("build", "Versions of the service and of what it stands on.")

seconds_histogram = partial(Histogram, labelnames=["model_name"], buckets=REQUEST_SECONDS)


class ModelMetrics:
    """The figures of one served model, kept by `observe`, which its engine calls."""

    RUNNING = Gauge("vllm:num_requests_running", "Sequences being generated.", ["model_name"])
    WAITING = Gauge("vllm:num_requests_waiting", "Sequences in the queue.", ["model_name"])
    HEALTHY = Gauge("engine_healthy", "0 while the model keeps failing.", ["model_name"])
    SLOTS = Gauge("vllm:max_num_seqs", "Sequences that can run at once.", ["model_name"])
    PROMPT_TOKENS = Counter(
        "vllm:prompt_tokens", "Prompt tokens, computed or found in the cache.", ["model_name"]
    )
    PREFIX_QUERIES = Counter(
        "vllm:prefix_cache_queries", "Prompt tokens looked for in the cache.", ["model_name"]
    )
    PREFIX_HITS = Counter(
        "vllm:prefix_cache_hits", "Prompt tokens found in the cache.", ["model_name"]
    )
    GENERATION_TOKENS = Counter("vllm:generation_tokens", "Tokens generated.", ["model_name"])
    DRAFTS = Counter(
        "vllm:spec_decode_num_drafts", "Sequences' steps with drafted tokens.", ["model_name"]
    )
    DRAFT_TOKENS = Counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", ["model_name"])
    ACCEPTED_TOKENS = Counter(
        "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were drawn.", ["model_name"]
    )
    FINISHED = Counter(
        "vllm:request_success", "Sequences finished.", ["model_name", "finished_reason"]
    )
    QUEUE = seconds_histogram("vllm:request_queue_time_seconds", "Time in the queue.")
    FIRST_TOKEN = seconds_histogram(
        "vllm:time_to_first_token_seconds", "From arrival to the first token."
    )
    NEXT_TOKEN = Histogram(
        "vllm:inter_token_latency_seconds", "From one token to the next.", ["model_name"],
        buckets=TOKEN_SECONDS,
    )  # fmt: skip
    REQUEST = seconds_histogram(
        "vllm:e2e_request_latency_seconds", "From arrival to the last token."
    )
    STEP = Histogram(
        "vllm:iteration_tokens_total", "Tokens that go through the model in one step.",
        ["model_name"], buckets=ROWS,
    )  # fmt: skip
    LOAD = Gauge("model_load_seconds", "How long the model took to load last.", ["model_name"])
    LOADED = Gauge("model_loaded", "0 while the model is not in memory.", ["model_name"])
    ABOUT = Gauge(
        "model_info",
        "1, for every served model.",
        ["model_name", *About._fields],
    )

    def __init__(self, name: str):
        self.name = name
        self.prompt_tokens = self.PROMPT_TOKENS.labels(name)
        self.prefix_queries = self.PREFIX_QUERIES.labels(name)
        self.prefix_hits = self.PREFIX_HITS.labels(name)
        self.generation_tokens = self.GENERATION_TOKENS.labels(name)
        self.drafts = self.DRAFTS.labels(name)
        self.draft_tokens = self.DRAFT_TOKENS.labels(name)
        self.accepted_tokens = self.ACCEPTED_TOKENS.labels(name)
        self.queue = self.QUEUE.labels(name)
        self.first_token = self.FIRST_TOKEN.labels(name)
        self.next_token = self.NEXT_TOKEN.labels(name)
        self.request = self.REQUEST.labels(name)
        self.step = self.STEP.labels(name)
        self.rolled_back = FILTER_HITS.labels("output")

    def observe(self, stats: StepStats) -> None:
        """Called in the engine's thread, after each step."""
        if stats.num_rows:  # what another server computes in a step is not known
            self.step.observe(stats.num_rows)
        self.prompt_tokens.inc(stats.num_prompt_tokens + stats.num_cached_tokens)
        self.prefix_queries.inc(stats.num_queried_tokens)
        self.prefix_hits.inc(stats.num_cached_tokens)
        self.generation_tokens.inc(
            len(stats.time_to_first_token_seconds)
            + len(stats.inter_token_seconds)
            + stats.num_untimed_tokens
        )
        self.drafts.inc(stats.num_drafts)
        self.draft_tokens.inc(stats.num_draft_tokens)
        self.accepted_tokens.inc(stats.num_accepted_tokens)
        for histogram, seconds in (
            (self.queue, stats.queue_seconds),
            (self.first_token, stats.time_to_first_token_seconds),
            (self.next_token, stats.inter_token_seconds),
        ):
            for each in seconds:
                histogram.observe(each)
        for finish_reason, request_seconds in stats.finished:
            self.FINISHED.labels(self.name, finish_reason).inc()
            self.request.observe(request_seconds)
        self.rolled_back.inc(stats.num_rollbacks)

    def watch(self, backend: Backend) -> None:
        """From now on a scrape reads the backend's own counts."""
        self.RUNNING.labels(self.name).set_function(lambda: backend.num_running)
        self.WAITING.labels(self.name).set_function(lambda: backend.num_waiting)
        self.HEALTHY.labels(self.name).set_function(lambda: backend.is_healthy)
        self.ABOUT.labels(self.name, *backend.about).set(1)
        if backend.max_num_seqs is not None:
            self.SLOTS.labels(self.name).set(backend.max_num_seqs)
            self.LOADED.labels(self.name).set_function(lambda: backend.is_loaded)


def tell_version(version: str) -> None:
    BUILD.info(
        {"version": version, "torch": torch.__version__, "transformers": transformers.__version__}
    )


async def render_metrics() -> bytes:
    """What this process counted, in Prometheus's text format."""
    return generate_latest()
