"""What the OpenAPI document says of the routes is so."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

import main
from serving.documentation import NO_CHAT, document_media, document_refusals
from serving.openai.routes import openai_routes
from serving.routes import service_routes, text_routes
from serving.settings import Settings
from tests.support import NAME, new_client, tokenizer

client = new_client()


def schemas_within(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of the document."""
    if isinstance(node, dict):
        yield node
    for inner in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from schemas_within(inner)


def operations() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Method, path and description of each operation by its id."""
    paths = client.get("/openapi.json").json()["paths"]
    listed = [(m, path, each) for path, methods in paths.items() for m, each in methods.items()]
    assert len({each["operationId"] for _, _, each in listed}) == len(listed)
    return {each["operationId"]: (method, path, each) for method, path, each in listed}


@pytest.mark.contract
def test_operation_ids_are_the_names_of_methods() -> None:
    """They held the path: clients had `create_completion_v1_completions_post`."""
    assert operations().keys() >= {
        "generate", "generate_texts", "generate_from_path", "stream_text", "stream_text_from_query",
        "create_completion", "create_chat_completion", "list_models", "retrieve_model",
        "health", "ready", "metrics", "root",
    }  # fmt: skip


@pytest.mark.contract
def test_generators_can_make_types_of_all_schemas() -> None:
    """Clients did not compile: a field that is always null has no type, a bound above 2^53 becomes
    a number with an exponent, a union's default is put where it fits one of its types, and Java's
    variables of a union are named after its types, `Map<String, Object>` too; a constant becomes an
    enumeration, of texts."""
    for each in schemas_within(client.get("/openapi.json").json()):
        assert not each.keys() & {"ge", "gt", "le", "lt"}  # pydantic's names: lost as bounds
        types = [inner.get("type") for inner in each.get("anyOf", [])]
        assert each.get("type") != "null" or set(each) == {"type"}
        assert types != ["null"]
        assert isinstance(each.get("const", ""), str)
        assert "object" not in types or set(types) == {"object", "null"}
        assert "default" not in each or not ("anyOf" in each or "$ref" in each)
        for bound in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            assert not isinstance(each.get(bound), int | float) or abs(each[bound]) <= 2**53
        for inner in each.get("properties", {}).values():
            assert inner != {"type": "null"}
            assert inner.get("type") != "null"


@pytest.mark.contract
def test_examples_of_parameters_are_answered() -> None:
    """What Swagger's "Try it out" fills in: `GET /v1/models/{model_id}` had nothing."""
    asked = 0
    for method, path, operation in operations().values():
        examples = {
            parameter["name"]: parameter["schema"]["examples"][0]
            for parameter in operation.get("parameters", [])
            if "examples" in parameter["schema"]
        }
        for parameter in operation.get("parameters", []):
            if parameter["required"]:  # where Swagger looks for what it fills in
                assert parameter["example"] == examples[parameter["name"]], path
        if method == "get":
            query = {name: each for name, each in examples.items() if f"{{{name}}}" not in path}
            assert client.get(path.format(**examples), params=query).status_code == 200, path
            asked += 1
    assert asked >= 8
    assert operations()["retrieve_model"][2]["parameters"][0]["schema"]["examples"] == [NAME]


@pytest.mark.contract
def test_openapi_has_an_example_and_the_errors_of_every_generating_route() -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            if operation["tags"] == ["generation"]:
                named = {"200", "400", "422", "500", "503", "504"}
                assert named <= set(operation["responses"]), path
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]
                schema = schemas[content["schema"]["$ref"].split("/")[-1]]
                status = 400 if NO_CHAT in operation["description"] else 200
                for example in schema["examples"]:
                    assert client.post(path, json=example).status_code == status, path


def test_example_of_a_chat_asks_for_a_model_that_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asked for the default model, whose answer is 400, and nothing said so."""
    base = main.registry.default
    chat = SimpleNamespace(name="chat", takes_chat=True, vocab_size=None)
    for backends, model in (({NAME: base}, None), ({NAME: base, "chat": chat}, "chat")):
        monkeypatch.setattr(main.registry, "backends", backends)
        monkeypatch.setattr(main.app, "openapi_schema", None)
        document = new_client().get("/openapi.json").json()
        operation = document["paths"]["/v1/chat/completions"]["post"]
        assert (NO_CHAT in operation["description"]) == (model is None)
        (example,) = document["components"]["schemas"]["ChatCompletionRequest"]["examples"]
        assert example.get("model") == model


def test_vocabulary_is_where_top_k_ends() -> None:
    document = client.get("/openapi.json").json()
    body = document["components"]["schemas"]["GenerateRequest"]["properties"]
    parameters = document["paths"]["/{prompt}"]["get"]["parameters"]
    query = {each["name"]: each["schema"] for each in parameters}
    assert body["top_k"]["maximum"] == query["top_k"]["maximum"] == len(tokenizer)


def test_fields_of_pictures_end_where_the_settings_end_them() -> None:
    """The document told of 150 steps, and of a text model for pictures, whatever was set."""
    fields: dict[str, Any] = {
        "steps": {"maximum": 150, "examples": [25]},
        "size": {"description": "Like this."},
        "model": {"examples": [NAME]},
    }
    schemas = {name: {"properties": fields} for name in ("ImageGenerationRequest",)}
    document: dict[str, Any] = {"components": {"schemas": schemas}, "paths": {}}
    registry: Any = SimpleNamespace(media={"image": SimpleNamespace(name="painter")})
    document_media(document, registry, Settings(max_media_steps=20, max_side_pixels=640))
    assert fields == {
        "steps": {"maximum": 20, "examples": [20]},
        "size": {"description": "Like this. No side is longer than 640."},
        "model": {"examples": ["painter"]},
    }


def test_document_says_which_keys_and_limits_there_are() -> None:
    """It had no security schemes, and neither 401 nor 429: Swagger could not authorize."""
    app = FastAPI()
    for routes in (service_routes, text_routes, openai_routes):
        app.include_router(routes)
    document = app.openapi()
    document_refusals(document, Settings(rate_limit=5), needs_key=True)
    assert document["components"]["securitySchemes"].keys() == {"Bearer", "X-API-Key"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            met = {"401", "429", "503"} & operation["responses"].keys()
            needs = {"/": set(), "/health": set(), "/ready": {"503"}, "/metrics": {"401"}}
            assert met == needs.get(path, {"401", "429", "503"}), path
            assert ("security" in operation) == ("401" in met)
    refused = document["paths"]["/v1/models"]["get"]["responses"]["401"]["content"]
    assert refused["application/json"]["schema"] == {"$ref": "#/components/schemas/OpenAIError"}
    assert (
        "401" not in client.get("/openapi.json").json()["paths"]["/v1/models"]["get"]["responses"]
    )
