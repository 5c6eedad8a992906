"""A tokenizer in vLLM's shapes. The real lm-eval asks for it in test_openai_routes.py."""

import json
from typing import Any

import pytest

import main
from backends.prompts import Prompts
from engine import QueueFullError
from tests.support import FOLDER, NAME, PROMPT, ids, new_client, refused_fields, tokenizer

client = new_client()
ONE_MESSAGE = [{"role": "user", "content": "A fox"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def post(path: str, **fields: Any) -> Any:
    return client.post(path, json=fields)


def text_of(**fields: Any) -> str:
    """What the tokens spell that /tokenize gives."""
    text: str = tokenizer.decode(post("/tokenize", **fields).json()["tokens"])
    return text


@pytest.mark.contract
@pytest.mark.parametrize("text", ["", PROMPT, "Où est le café ? 🦊", PROMPT * 100])
def test_tokenize_gives_what_the_model_reads(text: str) -> None:
    response = post("/tokenize", prompt=text, model=NAME)
    expected = {"count": len(ids(text)), "max_model_len": 512, "tokens": ids(text)}
    assert (response.status_code, response.json()) == (200, {**expected, "token_strs": None})


@pytest.mark.contract
def test_tokenize_spells_tokens_as_the_vocabulary_does() -> None:
    answer = post("/tokenize", prompt="Once upon <|endoftext|>", return_token_strs=True).json()
    assert answer["token_strs"] == ["Once", "Ġupon", "Ġ", "<|endoftext|>"]


def test_tokenize_conversation_is_what_chat_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.registry.default.tokenizer, "chat_template", TEMPLATE)
    developer = {"role": "developer", "content": "Be kind."}
    assert text_of(messages=ONE_MESSAGE) == "[user]A fox[assistant]"
    assert text_of(messages=ONE_MESSAGE, add_generation_prompt=False) == "[user]A fox"
    assert text_of(messages=[developer]) == "[system]Be kind.[assistant]"


def test_tokenize_conversation_without_a_template_is_400() -> None:
    response = post("/tokenize", messages=ONE_MESSAGE)
    assert response.status_code == 400
    assert response.json()["detail"].startswith(f"{NAME} has no chat template")


@pytest.mark.parametrize("adds", [None, True, False])
def test_tokenize_adds_special_tokens_around_a_prompt_unless_told_otherwise(
    adds: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        Prompts,
        "_encode",
        lambda self, text, add_special_tokens: asked.append(add_special_tokens) or [],
    )
    monkeypatch.setattr(main.registry.default.tokenizer, "chat_template", TEMPLATE)
    post("/tokenize", prompt=PROMPT, add_special_tokens=adds)
    post("/tokenize", messages=ONE_MESSAGE, add_special_tokens=adds)
    assert asked == [adds is not False, adds is True]


@pytest.mark.contract
@pytest.mark.parametrize(
    "text", ["", PROMPT, " two  blanks ", "Où est le café ? 🦊", "<|endoftext|>"]
)
def test_detokenize_gives_the_text_back(text: str) -> None:
    response = post("/detokenize", tokens=ids(text))
    assert (response.status_code, response.json()) == (200, {"prompt": text})


def test_detokenize_takes_a_long_list_off_the_event_loop() -> None:
    response = post("/detokenize", tokens=ids(PROMPT) * 5000)
    assert (response.status_code, response.json()) == (200, {"prompt": PROMPT * 5000})


@pytest.mark.contract
def test_tokenize_takes_no_messages_beside_a_prompt() -> None:
    """It was a 422 for every text of Java clients that are made from the document: of a list that
    nobody has set, they send an empty one."""
    response = post("/tokenize", prompt=PROMPT, messages=[])
    assert (response.status_code, response.json()["tokens"]) == (200, ids(PROMPT))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("path", "fields", "place"),
    [
        ("/tokenize", {}, ["body", "prompt"]),
        ("/tokenize", {"prompt": "a", "messages": ONE_MESSAGE}, ["body", "prompt"]),
        ("/tokenize", {"prompt": ["a"]}, ["body", "prompt"]),
        ("/tokenize", {"prompt": "\ud800"}, ["body", "prompt"]),
        ("/tokenize", {"prompt": "a", "truncate": True}, ["body", "truncate"]),
        ("/tokenize", {"messages": []}, ["body", "prompt"]),
        ("/tokenize", {"prompt": "a", "continue_final_message": True},
         ["body", "continue_final_message"]),
        ("/detokenize", {}, ["body", "tokens"]),
        ("/detokenize", {"tokens": [-1]}, ["body", "tokens", 0]),
        ("/detokenize", {"tokens": [8192]}, ["body", "tokens"]),
        ("/detokenize", {"tokens": [10**30]}, ["body", "tokens"]),
        ("/detokenize", {"tokens": [1] * 131_073}, ["body", "tokens"]),
    ],
)  # fmt: skip
def test_invalid_field_is_named(path: str, fields: dict[str, Any], place: list[Any]) -> None:
    content = json.dumps(fields).encode()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert refused_fields(response) == [place]


@pytest.mark.contract
def test_unknown_model_is_404() -> None:
    for response in (
        post("/tokenize", prompt="a", model="none"),
        post("/detokenize", tokens=[1], model="none"),
        client.get("/tokenizer_info?model=none"),
    ):
        assert response.status_code == 404
        assert response.json()["detail"].startswith("No such model")


def test_tokenize_takes_a_place_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with too many texts to be read is refused as one with too many to be written."""

    def refuse(client: str, num_sequences: int) -> None:
        raise QueueFullError

    monkeypatch.setattr(main.engine.scheduler, "reserve", refuse)
    for response in (post("/tokenize", prompt=PROMPT), post("/detokenize", tokens=[1])):
        assert response.status_code == 503
        assert "Retry-After" in response.headers
    monkeypatch.undo()
    assert main.engine.num_waiting == 0


def test_tokenize_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.registry.default, "request_timeout_seconds", 1e-6)
    response = post("/tokenize", prompt=PROMPT * 100)
    assert response.status_code == 504
    assert main.engine.num_waiting == 0


@pytest.mark.contract
def test_tokenizer_info_is_the_tokenizers_configuration() -> None:
    response = client.get("/tokenizer_info")
    assert response.status_code == 200
    assert response.json() == {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": 512,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "chat_template": None,
    }
    assert str(FOLDER.parent) not in response.text
