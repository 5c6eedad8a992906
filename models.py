"""The schemas of every route, by family; the ranges in them are the contract.

Bodies are strict: `true`, `"3"` and `3.0` are not integers, NaN and infinities are no
numbers, unknown fields are refused; a null counts as left out. Query strings hold nothing but
text, so there the same fields are read from decimal digits.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError, PydanticUndefined

from neutral_values import (
    NEUTRAL_IMAGE_VALUES,
    NEUTRAL_MESSAGE_VALUES,
    NEUTRAL_SPEECH_VALUES,
    NEUTRAL_VALUES,
    drop_neutral,
    under_known_names,
    with_order_of_samplers,
)

MAX_PROMPT_CHARACTERS = 500
# Of 64 bits, with a sign or without; the document says int64, since generators know no more.
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
# A body is checked on the event loop, so whatever a client can make long has an end, at which
# pydantic stops; and of a list that may be long only the first fault is told.
MAX_FIELDS = 100  # of one object
MAX_PROMPTS = 4096
MAX_PROMPT_TOKENS = 131_072
MAX_MESSAGES = 2048
MAX_TEXT_PARTS = 256
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKENS = 128
MAX_CHOICES = 1024
MAX_CHOICE_CHARACTERS = 500
MAX_REGEX_CHARACTERS = 4096
MAX_GRAMMAR_CHARACTERS = 16_384  # and of a schema, written without blanks

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
INTEGER = re.compile("-?[0-9]+")


def _plain_text(text: str) -> str:
    """The text itself. Refuses what no tokenizer takes: NUL and lone surrogates."""
    if "\0" in text:
        raise ValueError("text must not contain the NUL character")
    if not text.isascii() and LONE_SURROGATE.search(text):
        raise ValueError("text must not contain lone surrogates")
    return text


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _of_64_bits(seed: int) -> int | None:
    """The seed; None for -1, which asks for any."""
    if not MIN_SEED <= seed <= MAX_SEED:
        raise ValueError("must be a 64-bit integer")
    return None if seed == -1 else seed


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


_UpToFour = Annotated[list[StopString], Field(max_length=4)]
StopStrings = Annotated[
    _UpToFour, BeforeValidator(_one_or_more, json_schema_input_type=StopString | _UpToFour)
]
_UpToSixteen = Annotated[list[StopString], Field(max_length=16)]
ManyStopStrings = Annotated[
    _UpToSixteen, BeforeValidator(_one_or_more, json_schema_input_type=StopString | _UpToSixteen)
]


CacheSalt = Annotated[
    str, StringConstraints(min_length=1, max_length=256), AfterValidator(_plain_text)
]


class _LeftOut:
    """Keeps null out of the document, where it would make two types of a field."""

    def __get_pydantic_json_schema__(self, nullable: Any, of: GetJsonSchemaHandler) -> Any:
        return of(nullable["schema"])


T = TypeVar("T")
# A field that may be left out; a null may stand for that. Generated clients do not send one.
Left = Annotated[T | None, _LeftOut()]


def _in_one_message(message: str, documented_type: Any = PydanticUndefined) -> WrapValidator:
    """One message for a union, instead of one for each of its members, unless a list is too
    long."""

    def validate(value: Any, validator: Callable[[Any], Any]) -> Any:
        try:
            return validator(value)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
        # Here, and not in the `except`: the new error would hold the old one, and that all input.
        for problem in problems:
            if problem["type"] == "too_long":
                raise PydanticKnownError("too_long", problem["ctx"])
        raise ValueError(message)

    return WrapValidator(validate, json_schema_input_type=documented_type)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        """A null field counts as left out, as in OpenAI's own API. Of very many fields each
        unknown one would be an error of its own."""
        if not isinstance(body, dict):
            return body
        if len(body) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"at most {MAX_FIELDS} fields")
        return {name: value for name, value in body.items() if value is not None}


# --- Sampling parameters, shared by every route -------------------------------------------------


MaxLength = Annotated[
    int,
    Field(
        ge=10,
        le=200,
        description="Total length in tokens, prompt included. When neither this nor "
        "`max_new_tokens` is sent, as many tokens as the default are generated after the prompt.",
    ),
]


class LengthFields(_Strict):
    """How much text is generated."""

    max_length: MaxLength = 50
    max_new_tokens: Left[Annotated[int, Field(ge=1, le=200)]] = Field(
        default=None,
        description="Tokens to generate after the prompt; wins over `max_length`.",
        examples=[50],
    )


Temperature = Annotated[
    float, Field(ge=0, le=2, description="0 always takes the likeliest token (greedy).")
]
TopP = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Only the likeliest tokens that together have this probability; 1 keeps all, "
        "0 takes the likeliest.",
    ),
]
TopK = Annotated[
    int,
    Field(
        ge=-1,
        description="Only so many of the likeliest tokens, up to the vocabulary; 0 and -1 keep "
        "all.",
    ),
]
NumSequences = Annotated[int, Field(ge=1, le=8, description="How many continuations to draw.")]


class SamplingFields(_Strict):
    """How the next token is chosen, on every route."""

    temperature: Temperature = 1.0
    top_p: TopP = 0.9
    top_k: TopK = 50
    seed: Left[Annotated[int, AfterValidator(_of_64_bits)]] = Field(
        default=None,
        description="Any 64-bit integer: the same one, with the same prompt and parameters, gives "
        "the same text. -1 draws one.",
        examples=[42],
        json_schema_extra={"format": "int64"},
    )
    # Defaults of unions and objects are made anew, which keeps them out of the document: what
    # generators make of them does not compile.
    stop: StopStrings = Field(
        default_factory=list,
        description="Up to four strings; the text ends before the first of them.",
        examples=[["\n\n"]],
    )


class TextFields(SamplingFields, LengthFields):
    """What every native route that generates takes."""


def _bounded(max_characters: int) -> Any:
    return StringConstraints(min_length=1, max_length=max_characters)


Choice = Annotated[str, _bounded(MAX_CHOICE_CHARACTERS), AfterValidator(_plain_text)]
Regex = Annotated[str, _bounded(MAX_REGEX_CHARACTERS), AfterValidator(_plain_text)]
Grammar = Annotated[str, _bounded(MAX_GRAMMAR_CHARACTERS), AfterValidator(_plain_text)]
JsonSchema = Annotated[
    dict[str, Any] | Grammar,
    _in_one_message(
        f"must be a JSON schema, an object or its text of up to {MAX_GRAMMAR_CHARACTERS} "
        "characters",
        # Of unions with an object in them, generators make classes that do not compile.
        documented_type=dict[str, Any],
    ),
]


def _without_constant(schema: dict[str, Any]) -> None:
    del schema["const"]


class StructuredOutputs(_Strict):
    """What a text is to be, in vLLM's spelling
    (https://docs.vllm.ai/en/latest/features/structured_outputs/): one of the first five."""

    model_config = ConfigDict(serialize_by_alias=True)

    choice: Left[Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)]] = Field(
        default=None, description="One of these texts.", examples=[["happy", "sad"]]
    )
    regex: Left[Regex] = Field(
        default=None,
        description="A text that this regular expression matches as a whole. The syntax is that of "
        "Rust's `regex`: nothing looks ahead or behind.",
        examples=["[0-9]{4}-[0-9]{2}-[0-9]{2}"],
    )
    json_schema: Left[JsonSchema] = Field(
        default=None,
        alias="json",
        description="JSON that fits this schema, an object or its text. Objects have no properties "
        "but those that it names, in its order.",
        examples=[{"type": "object", "properties": {"age": {"type": "integer"}}}],
    )
    json_object: Left[Literal[True]] = Field(
        default=None,
        description="True: any JSON object.",
        # Of a constant that is no string, generators make an enumeration that does not compile.
        json_schema_extra=_without_constant,
    )
    grammar: Left[Grammar] = Field(
        default=None,
        description="A text of this grammar, in llama.cpp's GBNF or in Lark's form.",
        examples=['root ::= "yes" | "no"'],
    )
    whitespace_pattern: Left[Regex] = Field(
        default=None,
        description="What may stand between the parts of JSON, a regular expression; by default "
        "one blank or none behind each comma and colon.",
    )
    disable_any_whitespace: bool = Field(
        default=False, description="JSON without blanks between its parts."
    )
    disable_additional_properties: bool = Field(
        default=True, description="False: objects may have properties that the schema leaves open."
    )

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        kinds = (self.choice, self.regex, self.json_schema, self.json_object, self.grammar)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("needs one of choice, regex, json, json_object and grammar")
        return self


class Structured(_Strict):
    structured_outputs: Left[StructuredOutputs] = Field(
        default=None, description="What the text is to be: the model chooses among such texts."
    )

    @property
    def structure(self) -> tuple[str, StructuredOutputs] | None:
        """What the text is to be, and the field that says so; None where any text will do."""
        return ("structured_outputs", self.structured_outputs) if self.structured_outputs else None


class SequenceCount(_Strict):
    num_return_sequences: NumSequences = 1


class ModelChoice(_Strict):
    model: Left[Text] = Field(
        default=None,
        max_length=256,
        description="A served model; the default one if left out or empty.",
    )


# --- Native routes ------------------------------------------------------------------------------


class GenerateRequest(ModelChoice, Structured, TextFields):
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


class GenerateTextRequest(SequenceCount, Structured, TextFields):
    """`POST /generate-text/`"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Once upon a time", "max_length": 60, "num_return_sequences": 2}
            ]
        }
    )

    prompt: Prompt
    max_length: MaxLength = 100


class GenerateTextResponse(BaseModel):
    generated_texts: dict[str, list[str]] = Field(
        description="For every served model, its texts.",
        examples=[{"gpt2": ["Once upon a time there was a king.", "Once upon a time, in a wood,"]}],
    )


class TextRequest(ModelChoice, TextFields):
    """`POST /generate/text`"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Once upon a time", "max_new_tokens": 60}]}
    )

    prompt: Prompt


class _FromQuery(BaseModel):
    """Reads a strict schema from a query string, where everything is text."""

    @field_validator(
        "max_length", "max_new_tokens", "top_k", "seed", "num_return_sequences", "steps",
        "num_frames", "frames_per_second", "grid_size", mode="before", check_fields=False,
    )  # fmt: skip
    @classmethod
    def _decimal_digits(cls, value: Any) -> Any:
        if isinstance(value, str) and not INTEGER.fullmatch(value):
            raise ValueError("not an integer in decimal digits")
        return value


class TextQuery(_FromQuery, TextRequest):
    """`GET /generate/text`"""

    model_config = ConfigDict(strict=False)


class PromptQuery(_FromQuery, ModelChoice, SequenceCount, TextFields):
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
    loaded_model_names: list[str] = Field(
        description="Those in memory; a request for another one swaps it in.", examples=[["gpt2"]]
    )
    loading_model_name: str | None = Field(description="The one being swapped in.")


# --- Errors of the native routes ----------------------------------------------------------------


class Error(BaseModel):
    detail: str


class InvalidField(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "max_length"]])
    msg: str = Field(examples=["Input should be greater than or equal to 10"])
    type: str = Field(examples=["greater_than_equal"])


class ValidationErrors(BaseModel):
    detail: list[InvalidField]


# --- OpenAI routes ------------------------------------------------------------------------------

Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[
    list[TokenId],
    Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True),
]
ListsOfTokenIds = Annotated[
    list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
]


def _strictly(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form, config=ConfigDict(strict=True))


TEXT_PROMPT = _strictly(Text)
LIST_PROMPTS = {  # by the type of the first element
    str: _strictly(Texts),
    int: _strictly(TokenIds),
    list: _strictly(ListsOfTokenIds),
}


def _by_first_element(value: Any, _: Callable[[Any], Any]) -> Any:
    """Looks through a prompt once, as what its first element says that it is. A union would try
    its four members in turn, and list what is wrong with each element for each of them."""
    first = value[0] if isinstance(value, list) and value else None
    return LIST_PROMPTS.get(type(first), TEXT_PROMPT).validate_python(value)


CompletionPrompt = Annotated[
    Text | Texts | TokenIds | ListsOfTokenIds,
    WrapValidator(_by_first_element),
    _in_one_message(
        "must be a string, a list of strings, a list of token ids or a list of such lists; "
        "no list may be empty, and no text may hold NUL or a lone surrogate"
    ),
]


def _few_biases(biases: Any) -> Any:
    """The biases themselves. Refuses too many before their keys are looked at, each of which
    could be an error of its own."""
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIASES:
        length = {"max_length": MAX_LOGIT_BIASES, "actual_length": len(biases)}
        raise PydanticKnownError("too_long", {"field_type": "Dictionary", **length})
    return biases


class StreamOptions(_Strict):
    include_usage: bool = Field(
        default=False, description="Send the usage in a last event of its own."
    )
    continuous_usage_stats: bool = Field(default=False, description="Send it in every event.")
    include_obfuscation: bool = Field(default=False, description="Accepted, ignored.")


class JsonSchemaFormat(_Strict):
    model_config = ConfigDict(serialize_by_alias=True)

    name: Left[Text] = Field(default=None, description="Accepted, ignored.")
    description: Left[Text] = Field(default=None, description="Accepted, ignored.")
    json_schema: dict[str, Any] = Field(
        default_factory=dict, alias="schema", description="As `json` of `structured_outputs`."
    )
    strict: Left[bool] = Field(default=None, description="Accepted: the schema always holds.")


class ResponseFormat(_Strict):
    """OpenAI's spelling of two kinds of `structured_outputs`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Left[JsonSchemaFormat] = Field(
        default=None, description="Of `json_schema` alone, which needs it."
    )

    @model_validator(mode="after")
    def _has_a_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is what type json_schema needs, and no other")
        return self

    @property
    def structure(self) -> StructuredOutputs | None:
        """The same in vLLM's spelling; None where any text will do."""
        if self.json_schema:
            return StructuredOutputs(json=self.json_schema.json_schema)
        return StructuredOutputs(json_object=True) if self.type == "json_object" else None


class OpenAIRequest(ModelChoice, Structured, SamplingFields):
    """What both `/v1` generation routes take."""

    top_p: TopP = 1.0
    top_k: TopK = 0
    stop: ManyStopStrings = Field(
        default_factory=list,
        description="Up to sixteen strings; the text ends before the first of them. One may be a "
        "special token of the model, like `<|endoftext|>`.",
        examples=[["\n\n"]],
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS, fail_fast=True)] = (
        Field(default=[], description="The text ends before the first of these tokens.")
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="End the text after the stop string or token, not before it."
    )
    n: NumSequences = 1
    presence_penalty: float = Field(
        default=0, ge=-2, le=2, description="Subtracted once from a token that was generated."
    )
    frequency_penalty: float = Field(
        default=0, ge=-2, le=2, description="Subtracted for each time a token was generated."
    )
    repetition_penalty: float = Field(
        default=1,
        ge=0.01,
        le=2,
        description="Above 1: tokens of prompt and text become less likely (CTRL's formula).",
    )
    repetition_penalty_range: int = Field(
        default=0,
        ge=-1,
        description="Of so many last tokens of prompt and text; 0 and -1: of all.",
    )
    min_p: float = Field(
        default=0,
        ge=0,
        le=1,
        description="Drops tokens less likely than this times the likeliest one.",
    )
    temperature_last: bool = Field(
        default=False,
        description="Let `top_k`, `top_p` and `min_p` go by the model's own probabilities, and "
        "apply the temperature to what they keep.",
    )
    min_tokens: int = Field(default=0, ge=0, description="No end before so many tokens.")
    ignore_eos: bool = Field(default=False, description="Generate past the end of the text.")
    logit_bias: Annotated[
        dict[
            Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})$")],
            Annotated[float, Field(ge=-100, le=100)],
        ],
        BeforeValidator(_few_biases),
    ] = Field(
        default={},
        max_length=MAX_LOGIT_BIASES,
        description="Added to the logits of these token ids; -100 all but bans.",
        examples=[{"11": -100}],
    )
    prompt_logprobs: Left[Annotated[int, Field(ge=0, le=20)]] = Field(
        default=None,
        description="Give the log probability of each token of the prompt, and those of so many "
        "likeliest tokens in its place; not in a stream.",
    )
    return_token_ids: bool = Field(
        default=False, description="Give the token ids of prompt and text, too."
    )
    stream: bool = Field(default=False, description="Send chunks as server-sent events.")
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: Left[str] = Field(default=None, description="Accepted, ignored.")
    response_format: Left[ResponseFormat] = Field(
        default=None, description="JSON, of any kind or by a schema, or any text."
    )
    cache_salt: Left[CacheSalt] = Field(
        default=None,
        description="Only prompts with the same one share keys and values, so that nobody else can "
        "tell by the time it takes how this one begins. Choose one that cannot be guessed.",
    )

    @property
    def structure(self) -> tuple[str, StructuredOutputs] | None:
        if self.response_format and (structure := self.response_format.structure):
            return "response_format", structure
        return super().structure

    @model_validator(mode="after")
    def _is_asked_for_once(self) -> Self:
        if self.structured_outputs and self.response_format and self.response_format.structure:
            reason = "must be left out beside structured_outputs"
            raise PydanticCustomError("two_values", reason, {"param": "response_format"})
        return self

    @property
    def asks_of_prompt(self) -> bool:
        """Whether the answer is to tell of the prompt's tokens."""
        return self.return_token_ids or self.prompt_logprobs is not None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict) or len(body) > MAX_FIELDS:
            return body
        fields = {name: value for name, value in body.items() if value is not None}
        fields = with_order_of_samplers(under_known_names(fields))
        return drop_neutral(fields, cls.model_fields, NEUTRAL_VALUES)


class CompletionRequest(OpenAIRequest):
    """`POST /v1/completions` (https://platform.openai.com/docs/api-reference/completions)"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0.8, "seed": 42},
                {"prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 1},
            ]
        }
    )

    prompt: CompletionPrompt = Field(
        default_factory=str,
        description="A text, several, or the token ids of one or of several. An empty text begins "
        "after the token that begins a text or, where there is none, ends one.",
        examples=["Once upon a time"],
    )
    max_tokens: int = Field(
        default=16,
        ge=-1,
        description="Tokens to generate, or as many as fit, if that is less; -1: as many as fit. "
        "0 generates nothing; with `echo` and `logprobs` it scores the prompt.",
    )
    logprobs: Left[Annotated[int, Field(ge=0, le=20)]] = Field(
        default=None,
        description="Give each token's log probability, and those of so many likeliest tokens.",
    )
    echo: bool = Field(default=False, description="Begin the text with the prompt.")
    best_of: Left[NumSequences] = Field(
        default=None,
        description="Draw so many and give the `n` with the highest mean log probability.",
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as a text or as token ids."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], [self.prompt] if is_one else self.prompt)

    @property
    def most_tokens(self) -> int | None:
        """How many tokens to generate at most; None: as many as fit."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def num_drawn(self) -> int:
        """How many continuations of each prompt are drawn."""
        return self.best_of or self.n


class TextPart(_Strict):
    type: Literal["text"]
    text: Text
    cache_control: Left[dict[str, Any]] = Field(default=None, description="Accepted, ignored.")


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS, fail_fast=True)],
        _in_one_message("must be a string or a list of text parts"),
    ] = Field(default_factory=str, description="May be left out of an assistant's message alone.")
    name: Left[Text] = Field(default=None, description="Accepted, ignored.")

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, message: Any) -> Any:
        if not isinstance(message, dict) or len(message) > MAX_FIELDS:
            return message
        if message.get("content") is None and message.get("role") != "assistant":
            raise ValueError("content must be a string or a list of text parts")
        return drop_neutral(message, cls.model_fields, NEUTRAL_MESSAGE_VALUES)

    @property
    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatCompletionRequest(OpenAIRequest):
    """`POST /v1/chat/completions` (https://platform.openai.com/docs/api-reference/chat)"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "Tell me a tale."}], "max_tokens": 60}
            ]
        }
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: Left[Annotated[int, Field(ge=-1)]] = Field(
        default=None,
        description="Tokens to generate, or as many as fit, if that is less; unset or -1: as many "
        "as fit.",
        examples=[60],
    )
    max_tokens: Left[Annotated[int, Field(ge=-1)]] = Field(
        default=None,
        description="The older name of `max_completion_tokens`.",
        examples=[60],
    )
    logprobs: bool = Field(default=False, description="Give each token's log probability.")
    top_logprobs: int = Field(
        default=0, ge=0, le=20, description="And those of so many likeliest tokens."
    )

    @property
    def most_tokens(self) -> int | None:
        """How many tokens to generate at most; None: as many as fit."""
        named = (self.max_completion_tokens, self.max_tokens)
        most_tokens = next((each for each in named if each is not None), -1)
        return None if most_tokens == -1 else most_tokens

    @property
    def names_length(self) -> bool:
        """Whether it says how long the answer may be, and be it as long as fits."""
        return not self.model_fields_set.isdisjoint({"max_completion_tokens", "max_tokens"})


# --- Tokens -------------------------------------------------------------------------------------


class TokenizeRequest(ModelChoice):
    """`POST /tokenize`, as vLLM has it"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Once upon a time", "return_token_strs": True}]}
    )

    prompt: Left[Text] = Field(default=None, description="A text, however long a body may be.")
    messages: Left[Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)]] = (
        Field(
            default=None,
            description="Or a conversation, by the model's chat template; an empty list is none.",
        )
    )
    add_special_tokens: Left[bool] = Field(
        default=None,
        description="Put the tokens around it that the tokenizer has for that. Left out: around a "
        "prompt; a chat template brings its own.",
    )
    add_generation_prompt: bool = Field(
        default=True, description="End a conversation where the answer begins."
    )
    return_token_strs: bool = Field(
        default=False, description="Give the tokens as the vocabulary spells them, too."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict) or len(body) > MAX_FIELDS:
            return body
        # Java clients that openapi-generator makes send an empty list for one that was not set.
        fields = {name: body[name] for name in body if (name, body[name]) != ("messages", [])}
        return drop_neutral(fields, cls.model_fields, NEUTRAL_VALUES)

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            reason = "there must be either a prompt or messages"
            raise PydanticCustomError("one_of_two", reason, {"param": "prompt"})
        return self


class TokenizeResponse(BaseModel):
    count: int = Field(examples=[4])
    max_model_len: int = Field(description="Tokens of prompt and text together.", examples=[1024])
    tokens: list[int] = Field(description="The token ids.", examples=[[7454, 2402, 257, 640]])
    token_strs: list[str] | None = Field(
        description="The tokens as the vocabulary spells them, if asked for.",
        examples=[["Once", "Ġupon", "Ġa", "Ġtime"]],
    )


class DetokenizeRequest(ModelChoice):
    """`POST /detokenize`, as vLLM has it"""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [0, 1, 2]}]})

    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)] = Field(
        description="Token ids; those of special tokens give their names."
    )


class DetokenizeResponse(BaseModel):
    prompt: str = Field(description="The text.", examples=["Once upon a time"])


class TokenizerConfig(BaseModel):
    """What a `tokenizer_config.json` says: the special tokens that there are, too."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str = Field(examples=["GPT2Tokenizer"])
    model_max_length: int = Field(
        description="Tokens of prompt and text together, as they are served.", examples=[1024]
    )
    eos_token: str | None = Field(description="Ends a text.", examples=["<|endoftext|>"])
    chat_template: str | None = Field(description="In Jinja; null: the model takes no chat.")


# --- OpenAI responses ---------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(
        description="That were not computed, as a prompt before began in the same way.",
        examples=[0],
    )


class Usage(BaseModel):
    prompt_tokens: int = Field(examples=[4])
    completion_tokens: int = Field(examples=[40])
    total_tokens: int = Field(examples=[44])
    prompt_tokens_details: PromptTokensDetails | None = Field(
        description="Null where another server does not tell it."
    )


class CompletionLogprobs(BaseModel):
    """Of each token; a token that is no whole character is written `bytes:\\xe2\\x80`."""

    tokens: list[str] = Field(examples=[[" there", " was"]])
    token_logprobs: list[float | None] = Field(
        description="Null for the first token of an echoed prompt.", examples=[[-1.2, -0.4]]
    )
    top_logprobs: list[dict[str, float] | None] | None = Field(
        examples=[[{" there": -1.2}, {" was": -0.4}]]
    )
    text_offset: list[int] = Field(
        description="Where in `text` each token begins, in characters; its end for those of a stop "
        "string, which the text leaves out.",
        examples=[[0, 6]],
    )


FinishReason = Literal["stop", "length", "content_filter"]


StopReason = Annotated[
    int | str | None,
    Field(
        description="The stop string or the id of the stop token that ended the text, else null."
    ),
]


TokenIdsToTell = Annotated[
    list[int] | None, Field(description="With `return_token_ids`; of a chunk, those it adds.")
]
PromptTokenIdsToTell = Annotated[
    list[int] | None, Field(description="With `return_token_ids`; in a stream once.")
]


class PromptLogprob(BaseModel):
    logprob: float = Field(examples=[-1.2])
    rank: int = Field(description="1: none was likelier.", examples=[1])
    decoded_token: str = Field(examples=[" upon"])


PromptLogprobsToTell = Annotated[
    list[dict[str, PromptLogprob] | None] | None,
    Field(
        description="With `prompt_logprobs`: for each token of the prompt itself and the "
        "likeliest ones, by their ids; null for the first."
    ),
]


class CompletionChoice(BaseModel):
    index: int = Field(examples=[0])
    text: str = Field(examples=[" there was a king"])
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = Field(description="Null in a chunk before the last.")
    stop_reason: StopReason = None
    token_ids: TokenIdsToTell = None
    prompt_token_ids: PromptTokenIdsToTell = None
    prompt_logprobs: PromptLogprobsToTell = None


class _OpenAIResponse(BaseModel):
    id: str = Field(examples=["cmpl-2f6ae1c1b8a84b1c8ad9c5fcb9d3e6ad"])
    created: int = Field(description="Seconds since 1970.", examples=[1700000000])
    model: str = Field(examples=["gpt2"])
    system_fingerprint: str = Field(examples=["fp_9c5fcb9d3e"])
    usage: Usage | None = Field(description="Null in a chunk, unless asked for.")


class Completion(_OpenAIResponse):
    """The answer, and each chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    token: str = Field(examples=[" there"])
    logprob: float = Field(examples=[-1.2])
    bytes: list[int] | None = Field(examples=[[32, 116, 104, 101, 114, 101]])


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: list[TokenLogprob] | None = Field(default=None, description="Always null.")


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str = Field(examples=["There was a king."])
    refusal: str | None = Field(default=None, description="Always null.")


class ChatChoice(BaseModel):
    index: int = Field(examples=[0])
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: StopReason = None
    token_ids: TokenIdsToTell = None


class ChatCompletion(_OpenAIResponse):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_token_ids: PromptTokenIdsToTell = None
    prompt_logprobs: PromptLogprobsToTell = None


class MessageDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: StopReason = None
    token_ids: TokenIdsToTell = None


class ChatCompletionChunk(_OpenAIResponse):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    prompt_token_ids: PromptTokenIdsToTell = None


class Model(BaseModel):
    id: str = Field(examples=["gpt2"])
    object: Literal["model"] = "model"
    created: int = Field(description="When it was loaded.", examples=[1700000000])
    owned_by: str = Field(examples=["openai-community"])
    max_model_len: int | None = Field(
        description="Tokens of prompt and text together; null where an external server does not "
        "tell.",
        examples=[1024],
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class OpenAIErrorBody(BaseModel):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["max_tokens"])
    code: str | None = Field(examples=["context_length_exceeded"])


class OpenAIError(BaseModel):
    error: OpenAIErrorBody


# --- Sounds, pictures, videos, shapes -----------------------------------------------------------

# Settings may lower the upper ones.
MAX_STEPS = 150
MIN_SIDE_PIXELS, MAX_SIDE_PIXELS = 64, 2048
MAX_AUDIO_SECONDS = 60.0
MAX_VIDEO_FRAMES = 256
MIN_GRID_SIZE, MAX_GRID_SIZE = 16, 256
MAX_IMAGES = 4  # of one request on `/v1`
MAX_IMAGE_PROMPT_CHARACTERS = 4000  # there, as OpenAI has it
MAX_SPEECH_CHARACTERS = 4096  # OpenAI's own limit

SIZE = re.compile("([1-9][0-9]{1,3})x([1-9][0-9]{1,3})")


def _size_in_pixels(size: str) -> str:
    """The size itself. Refuses what is no size, and sides out of range."""
    sides = SIZE.fullmatch(size)
    bounds = range(MIN_SIDE_PIXELS, MAX_SIDE_PIXELS + 1)
    if not sides or not all(int(side) in bounds for side in sides.groups()):
        reason = f"must be like 512x512, each side from {MIN_SIDE_PIXELS} to {MAX_SIDE_PIXELS}"
        raise ValueError(reason)
    return size


class _Media(_Strict):
    # The models of a service that makes text alone are not built.
    model_config = ConfigDict(defer_build=True)


class MediaFields(_Media):
    """What is said of everything that is made."""

    prompt: Prompt
    seed: Left[Annotated[int, AfterValidator(_of_64_bits)]] = Field(
        default=None,
        description="Any 64-bit integer: the same one, with the same prompt and parameters, gives "
        "the same result. -1 draws one; the header `X-Seed` tells which.",
        examples=[42],
        json_schema_extra={"format": "int64"},
    )


class StreamChoice(_Media):
    stream: bool = Field(
        default=False,
        description="Tell of every step as a server-sent event; the last one holds the result.",
    )


class DiffusionFields(_Media):
    """How noise becomes what was asked for."""

    steps: Left[Annotated[int, Field(ge=1, le=MAX_STEPS)]] = Field(
        default=None, description="If left out, the pipeline's own default.", examples=[25]
    )
    guidance: Left[Annotated[float, Field(ge=0, le=30)]] = Field(
        default=None,
        description="How closely the prompt is followed; if left out, the pipeline's own default.",
        examples=[7.5],
    )


class SizeField(_Media):
    size: Left[Annotated[str, AfterValidator(_size_in_pixels)]] = Field(
        default=None,
        description="Width and height in pixels; if left out, the pipeline's own.",
        examples=["512x512"],
    )


class ImageFields(SizeField, DiffusionFields, MediaFields):
    """What a picture is made of."""


class ImageRequest(StreamChoice, ImageFields):
    """`POST /generate/image`"""


class ImageQuery(_FromQuery, ImageFields):
    """`GET /generate/image`"""

    model_config = ConfigDict(strict=False)


class AudioFields(MediaFields):
    """What a sound is made of."""

    seconds: Left[Annotated[float, Field(gt=0, le=MAX_AUDIO_SECONDS)]] = Field(
        default=None,
        description="The longest that it may become; 10 if left out, of models that take a length.",
        examples=[5],
    )


class AudioRequest(StreamChoice, AudioFields):
    """`POST /generate/audio`"""


class AudioQuery(_FromQuery, AudioFields):
    """`GET /generate/audio`"""

    model_config = ConfigDict(strict=False)


class VideoFields(SizeField, DiffusionFields, MediaFields):
    """What a video is made of."""

    num_frames: Left[Annotated[int, Field(ge=1, le=MAX_VIDEO_FRAMES)]] = Field(
        default=None, description="If left out, the pipeline's own default.", examples=[16]
    )
    frames_per_second: Annotated[int, Field(ge=1, le=60)] = 8


class VideoRequest(StreamChoice, VideoFields):
    """`POST /generate/video`"""


class VideoQuery(_FromQuery, VideoFields):
    """`GET /generate/video`"""

    model_config = ConfigDict(strict=False)


class ShapeFields(DiffusionFields, MediaFields):
    """What a shape is made of."""

    grid_size: Left[Annotated[int, Field(ge=MIN_GRID_SIZE, le=MAX_GRID_SIZE)]] = Field(
        default=None,
        description="Points a side of the grid that the surface is found on, 128 if left out; what "
        "it takes grows with the cube of it.",
        examples=[64],
    )


class ShapeRequest(StreamChoice, ShapeFields):
    """`POST /generate/3d`"""


class ShapeQuery(_FromQuery, ShapeFields):
    """`GET /generate/3d`"""

    model_config = ConfigDict(strict=False)


class ImageGenerationRequest(SizeField, DiffusionFields, MediaFields):
    """`POST /v1/images/generations`"""

    prompt: Annotated[
        str,
        StringConstraints(min_length=1, max_length=MAX_IMAGE_PROMPT_CHARACTERS),
        AfterValidator(_plain_text),
    ]
    model: Left[Text] = Field(default=None, max_length=256)
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_cannot_be_done(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = drop_neutral(body, cls.model_fields, NEUTRAL_IMAGE_VALUES)
        if fields.get("size") == "auto":
            del fields["size"]
        return fields


class GeneratedImage(BaseModel):
    b64_json: str = Field(description="A PNG in base64.")
    seed: int = Field(description="With which `n: 1` gives the same picture.")


class GeneratedImages(BaseModel):
    created: int = Field(description="In seconds since 1970.")
    data: list[GeneratedImage]
    output_format: str = Field(examples=["png"])
    model: str


SpeechFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class SpeechRequest(_Media):
    """`POST /v1/audio/speech`"""

    model: Text = Field(max_length=256)
    input: Annotated[
        str,
        StringConstraints(min_length=1, max_length=MAX_SPEECH_CHARACTERS),
        AfterValidator(_plain_text),
    ]
    response_format: SpeechFormat = "mp3"
    seed: Left[Annotated[int, AfterValidator(_of_64_bits)]] = Field(
        default=None, json_schema_extra={"format": "int64"}
    )
    seconds: Left[Annotated[float, Field(gt=0, le=MAX_AUDIO_SECONDS)]] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_cannot_be_done(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return drop_neutral(body, cls.model_fields, NEUTRAL_SPEECH_VALUES)


def build_media_schemas() -> None:
    """To be called before a route takes one of them: FastAPI keeps back what pydantic warns of
    while it makes a route, but not while a deferred schema is built later on."""
    for schema in (
        AudioQuery, AudioRequest, ImageQuery, ImageRequest, VideoQuery, VideoRequest, ShapeQuery,
        ShapeRequest, ImageGenerationRequest, SpeechRequest,
    ):  # fmt: skip
        schema.model_config["defer_build"] = False
        schema.model_rebuild()
