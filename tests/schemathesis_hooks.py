"""What schemathesis is to know of bodies beyond the document, which says what generators of clients
understand: one type for each field, without null, and integers of 64 bits with a sign."""

from typing import Any

import schemathesis

import models

NULL = {"type": "null"}


@schemathesis.hook
def before_load_schema(_: Any, document: dict[str, Any]) -> None:
    """Takes the schema of streams away, which is that of the whole body: a string. Schemathesis
    would hold each event to it."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for response in operation["responses"].values():
                response.get("content", {}).get("text/event-stream", {}).pop("schema", None)
            for parameter in operation.get("parameters", ()):
                widen_seed({parameter["name"]: parameter["schema"]})
    for schema in document["components"]["schemas"].values():
        if schema.get("additionalProperties") is False:  # it is of bodies
            widen(schema)


def widen(schema: dict[str, Any]) -> None:
    """Lets a body have all that routes take: null for what may be left out, known or not."""
    schema["additionalProperties"] = NULL
    properties = schema["properties"]
    widen_seed(properties)
    if "user" in properties:  # which is ignored
        properties["user"] = {}
    if "json_object" in properties:  # the schema in `json` may come as its text
        text = {"type": "string", "minLength": 1, "maxLength": models.MAX_GRAMMAR_CHARACTERS}
        properties["json"] = {"anyOf": [properties["json"], text]}
    for name in properties.keys() - {*schema.get("required", ())}:
        properties[name] = {"anyOf": [properties[name], NULL]}


def widen_seed(schemas: dict[str, Any]) -> None:
    if "seed" in schemas:
        del schemas["seed"]["format"]
        schemas["seed"] |= {"minimum": models.MIN_SEED, "maximum": models.MAX_SEED}
