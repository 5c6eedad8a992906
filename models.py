"""The schemas of every route, by family; the ranges in them are the contract.

Bodies are strict: `true`, `"3"` and `3.0` are not integers, NaN and infinities are no
numbers, unknown fields are refused. Query strings hold nothing but text, so there the
same fields are read from decimal digits.
"""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
)

MAX_PROMPT_CHARACTERS = 500
MAX_SEED = 2**63 - 1


def _plain_text(text: str) -> str:
    """The text itself. Refuses what no tokenizer takes: NUL and lone surrogates."""
    if "\0" in text:
        raise ValueError("text must not contain the NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text must not contain lone surrogates")
    return text


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_plain_text)]
Prompt = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARACTERS),
    AfterValidator(_plain_text),
    Field(
        description=f"What the text begins with: 1 to {MAX_PROMPT_CHARACTERS} characters.",
        examples=["Once upon a time"],
    ),
]
StopString = Annotated[
    str, StringConstraints(min_length=1, max_length=100), AfterValidator(_plain_text)
]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# --- Sampling parameters, shared by every route -------------------------------------------------


class LengthParams(_Strict):
    """How much text is generated."""

    max_length: int = Field(
        default=50,
        ge=10,
        le=200,
        description="Total length in tokens, prompt included. When neither this nor "
        "`max_new_tokens` is sent, as many tokens as the default are generated after the prompt.",
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        le=200,
        description="Tokens to generate after the prompt; wins over `max_length`.",
        examples=[50],
    )


class SamplingParams(_Strict):
    """How the next token is chosen, on every route."""

    temperature: float = Field(
        default=1.0, ge=0, le=2, description="0 always takes the likeliest token (greedy)."
    )
    top_p: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Only the likeliest tokens that together have this probability; 1 keeps all.",
    )
    top_k: int = Field(
        default=50,
        ge=0,
        description="Only so many of the likeliest tokens, up to the vocabulary; 0 keeps all.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="The same seed, prompt and parameters give the same text.",
        examples=[42],
    )
    stop: Annotated[list[StopString], BeforeValidator(_one_or_more)] = Field(
        default=[],
        max_length=4,
        description="Up to four strings; the text ends before the first of them.",
        examples=[["\n\n"]],
    )


class SequenceCount(_Strict):
    num_return_sequences: int = Field(
        default=1, ge=1, le=8, description="How many continuations to draw."
    )


class ModelChoice(_Strict):
    model: Text | None = Field(
        default=None, max_length=256, description="A served model; the default one if left out."
    )


# --- Native routes ------------------------------------------------------------------------------


class GenerateRequest(ModelChoice, SamplingParams, LengthParams):
    """`POST /generate`"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Once upon a time", "max_length": 50},
                {
                    "prompt": "The old king said",
                    "max_new_tokens": 40,
                    "temperature": 0.7,
                    "seed": 42,
                },
            ]
        }
    )

    prompt: Prompt
    stream: bool = Field(
        default=False, description="Send the text as server-sent events while it is generated."
    )


class GenerateResponse(BaseModel):
    generated_text: str = Field(
        description="The prompt and its continuation.",
        examples=["Once upon a time there was a king who had three sons."],
    )
    model_name: str = Field(description="What really answered.", examples=["gpt2"])


class GenerateTextRequest(SequenceCount, SamplingParams, LengthParams):
    """`POST /generate-text/`"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Once upon a time", "max_length": 60, "num_return_sequences": 2}
            ]
        }
    )

    prompt: Prompt
    max_length: int = Field(
        default=100, ge=10, le=200, description=LengthParams.model_fields["max_length"].description
    )


class GenerateTextResponse(BaseModel):
    generated_texts: dict[str, list[str]] = Field(
        description="For every served model, its texts.",
        examples=[{"gpt2": ["Once upon a time there was a king.", "Once upon a time, in a wood,"]}],
    )


class TextRequest(ModelChoice, SamplingParams, LengthParams):
    """`POST /generate/text`"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Once upon a time", "max_new_tokens": 60}]}
    )

    prompt: Prompt


class _FromQuery(BaseModel):
    """Reads a strict schema from a query string, where everything is text."""

    @field_validator(
        "max_length", "max_new_tokens", "top_k", "seed", "num_return_sequences",
        mode="before", check_fields=False,
    )  # fmt: skip
    @classmethod
    def _decimal_digits(cls, value: Any) -> Any:
        if isinstance(value, str) and not (value.isascii() and value.isdigit()):
            raise ValueError("not an integer in decimal digits")
        return value


class TextQuery(_FromQuery, TextRequest):
    """`GET /generate/text`"""

    model_config = ConfigDict(strict=False)


class PromptQuery(_FromQuery, ModelChoice, SequenceCount, SamplingParams, LengthParams):
    """`GET /{prompt}`"""

    model_config = ConfigDict(strict=False)


class GeneratedSequences(BaseModel):
    generated_sequences: list[str] = Field(
        description="Each begins with the prompt.",
        examples=[["Once upon a time there was a king who had three sons."]],
    )


class Health(BaseModel):
    health: str = Field(examples=["ok"])


class Readiness(BaseModel):
    status: str = Field(description="`ready`, or why not.", examples=["ready"])
    model_names: list[str] = Field(description="The first is the default.", examples=[["gpt2"]])


# --- Errors of the native routes ----------------------------------------------------------------


class Error(BaseModel):
    detail: str


class InvalidField(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "max_length"]])
    msg: str = Field(examples=["Input should be greater than or equal to 10"])
    type: str = Field(examples=["greater_than_equal"])


class ValidationErrors(BaseModel):
    detail: list[InvalidField]
