"""Which paths are no prompts: what programs, browsers and crawlers ask for by themselves.

`GET /{prompt}` would answer them all with generated text. A probe that asks for the wrong path
would always be green, and a client that has left out `/v1` would find an empty list of models.
"""

import re

# What to ask for instead, and the paths that other servers have for it.
RESERVED = {
    "liveness is GET /health": """
        health/ health/live healthcheck health_check health_generate heartbeat is_alive liveness
        liveness_check status v1/health v2/health/live _health -/healthy
        actuator/health api/health""",
    "readiness is GET /ready": """
        ready/ health/ready is_ready readiness readiness_check v2/health/ready -/ready""",
    "the models are at GET /v1/models": """
        api/models api/ps api/tags api/v0/models api/v1/model api/v1/models get_model_info model
        model_info models props v1 v1/model/info v2/models""",
    "the version is in GET /openapi.json": """
        api/version api/extra/version build_info buildinfo server_info get_server_info info
        version v1/version""",
    "completions are at POST /v1/completions": """
        api/completions api/generate api/v1/generate completion completions engines infill
        invocations predict predictions v1/v1/completions""",
    "chat completions are at POST /v1/chat/completions": """
        api/chat api/chat/completions chat/completions v1/v1/chat/completions""",
    "figures are at GET /metrics": "load prometheus slots stats api/metrics v1/metrics",
    "the API is described at GET /docs": """
        api api-docs apidocs graphql openapi openapi.yaml swagger swagger-ui v1/docs v2 v3""",
    "tokens are at POST /tokenize and POST /detokenize": """
        detokenize tokenize v1/detokenize v1/tokenize""",
    "there is no such API here": """
        apply-template embedding embeddings lora-adapters rerank responses
        static-offline-docs v1/embeddings v1/responses""",
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
