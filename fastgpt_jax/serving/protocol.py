"""The bodies of requests and answers that several routes share, and those of the small routes.

Knows no engine. The one idea: these classes are the documentation of the API (`/openapi.json` is made of them), and
what they accept is exactly what is acted upon: a field that nothing reads is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from fastgpt_jax.serving.body import FieldError

MAX_NAMES = 100
"""Of an object whose names are known; more than any has."""
TokenIds = list[int]
Prompt = str | TokenIds

_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        _IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _IDS_SCHEMA},
    ]
}


class Request(BaseModel):
    """A body; a field that is unknown or of another type is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        """Each unknown name would be an error of its own, and a body has room for a million."""
        if isinstance(value, dict) and len(value) > MAX_NAMES:
            raise FieldError(f"at most {MAX_NAMES} names are allowed in an object, got {len(value)}", "limit_exceeded")
        return value


class Answer(BaseModel):
    """What a route answers."""

    model_config = ConfigDict(frozen=True)


def _as_prompts(value: Any) -> list[Prompt]:
    """A list of prompts from the four forms: text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [_as_ids(value)]
        if all(type(item) is str for item in value):
            return value
        if all(type(item) is list for item in value):
            return [_as_ids(item) for item in value]
    raise FieldError("must be a text, a list of texts, a list of token ids or a list of these", "invalid_type")


def _as_ids(value: Any) -> TokenIds:
    """Token ids of at least 0; that they lie in the vocabulary is checked where that is known."""
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise FieldError("token ids must be a list of integers that is not empty", "invalid_type")
    if min(value) < 0:
        raise FieldError(f"token ids must be at least 0, got {min(value)}")
    return value


Prompts = Annotated[list[Any], BeforeValidator(_as_prompts), WithJsonSchema(_PROMPTS_SCHEMA)]
"""A list of `Prompt`, whichever form it came in."""
Ids = Annotated[list[int], BeforeValidator(_as_ids), WithJsonSchema(_IDS_SCHEMA)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Label = Annotated[str, Field(max_length=512)]


class ErrorObject(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """What every route answers when it does not do what was asked."""

    error: ErrorObject


class PromptTokensDetails(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class EmbeddingRequest(Request):
    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    cache_salt: Label = ""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    user: Label | None = None


class Embedding(Answer):
    """One input's vector, of length 1: a list of numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class DetokenizeRequest(Request):
    model: str | None = None
    tokens: Annotated[list[int], BeforeValidator(lambda value: _as_ids(value) if value else value)]


class DetokenizeAnswer(Answer):
    prompt: str


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: TokenIds
    token_strs: list[str] | None = None
