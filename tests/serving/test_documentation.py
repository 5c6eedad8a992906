"""What the OpenAPI document says of the routes is so."""

import pytest

from tests.support import new_client, tokenizer

client = new_client()


@pytest.mark.contract
def test_openapi_has_an_example_and_the_errors_of_every_generating_route() -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            if operation["tags"] != ["generation"]:
                continue
            assert {"200", "400", "422", "500", "503", "504"} <= set(operation["responses"]), path
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]
                schema = schemas[content["schema"]["$ref"].split("/")[-1]]
                for example in schema["examples"]:
                    assert client.post(path, json=example).status_code == 200
            else:
                prompt = next(p for p in operation["parameters"] if p["name"] == "prompt")
                assert prompt["schema"]["examples"]


def test_vocabulary_is_where_top_k_ends() -> None:
    document = client.get("/openapi.json").json()
    body = document["components"]["schemas"]["GenerateRequest"]["properties"]
    parameters = document["paths"]["/{prompt}"]["get"]["parameters"]
    query = {each["name"]: each["schema"] for each in parameters}
    assert body["top_k"]["maximum"] == query["top_k"]["maximum"] == len(tokenizer)
