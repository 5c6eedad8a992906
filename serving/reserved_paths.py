"""Which paths are no prompts: what programs, browsers and crawlers ask for by themselves.

`GET /{prompt}` would answer them all with generated text. A probe that asks for the wrong path
would always be green, and a client that has left out `/v1` would find an empty list of models.
"""

import re

# What to ask for instead, and the paths that other servers have for it.
RESERVED = {
    "liveness is GET /health": """
        health/ healthz/ livez/ ping/ health-check health/live healthcheck health_check
        health_generate healthy heartbeat alive is-alive is_alive isalive is_healthy live liveliness
        liveness liveness_check startup startupz status statusz up v1/health v2/health/live _health
        _ping _status -/healthy actuator actuator/health actuator/health/liveness api/health
        api/healthz api/status""",
    "readiness is GET /ready": """
        ready/ readyz/ health/ready is-ready is_ready isready readiness readiness_check
        v1/health/ready v2/health/ready -/ready actuator/health/readiness api/ready""",
    "the models are at GET /v1/models": """
        api/models api/ps api/show api/tags api/v0/models api/v1/config/max_context_length
        api/v1/config/max_length api/v1/model api/v1/models get_model_info model model_info models
        props v1 v1/engines v1/internal/model/info v1/internal/model/list v1/model v1/model/info
        v1/model/list v2/models""",
    "the version is in GET /openapi.json": """
        api/version api/extra/version api/v1/info/version build_info buildinfo server_info
        get_server_info info openapi.json/ server_version version v1/version""",
    "texts are at POST /generate": "generate generate-text generate_stream generate/text/",
    "completions are at POST /v1/completions": """
        api/completions api/extra/generate/check api/extra/generate/stream api/generate
        api/v1/generate completion completions engines infill invocations predict predictions
        v1/completions/ v1/v1/completions""",
    "chat completions are at POST /v1/chat/completions": """
        api/chat api/chat/completions chat/completions v1/chat/completions/ v1/messages
        v1/v1/chat/completions""",
    "figures are at GET /metrics": """
        load metrics/ prometheus slots stats api/extra/perf api/metrics v1/metrics""",
    "the API is described at GET /docs": """
        api api-docs api/docs apidocs docs/ graphql openapi openapi.yaml redoc/ swagger swagger-ui
        swagger.json v1/docs v2 v3""",
    "tokens are at POST /tokenize and POST /detokenize": """
        api/extra/detokenize api/extra/tokencount detokenize tokenize v1/detokenize
        v1/internal/decode v1/internal/encode v1/internal/token-count v1/token/decode
        v1/token/encode v1/tokenize""",
    "there is no such API here": """
        apply-template classify collective_rpc embedding embeddings flush_cache get_load is_paused
        is_sleeping lora-adapters pooling rerank responses score static-offline-docs v1/embeddings
        v1/responses""",
}
RIGHT_PATHS = {f"/{path}": told for told, paths in RESERVED.items() for path in paths.split()}

# A bare name of a file, as browsers, crawlers and those who look for a way in ask for:
# `robots.txt`, `.env`. `I love node.js` and `...and then` are prompts.
FILE = re.compile(
    r"/(\.\w[\w.-]*"
    r"|[\w.-]+\.(aspx?|bak|css|env|gif|gz|html?|ico|jpe?g|json|jsp|map|m?js|php|png|sql|svg|txt"
    r"|webmanifest|webp|xml|ya?ml|zip))",
    re.IGNORECASE,
)


def reserved(path: str) -> str | None:
    """Why there is nothing under a path that is no prompt; None for any other path."""
    if told := RIGHT_PATHS.get(path) or RIGHT_PATHS.get(path.rstrip("/")):
        return f"Not Found: {told}"
    return "Not Found" if FILE.fullmatch(path) else None
