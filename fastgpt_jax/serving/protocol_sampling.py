"""How to continue a prompt, as a request says it: the fields that completions and chats share.

Knows no engine. The one idea: a field has the name and the meaning it has in `SamplingParams`, so that most are handed
on as they are; the ranges here are those of the documentation, and `SamplingParams` has the last word.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from fastgpt_jax.serving.body import FieldError
from fastgpt_jax.serving.protocol import Int64, Label, Request


def _as_stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(type(stop) is str for stop in stops):
        raise FieldError("must be a text or a list of texts", "invalid_type")
    if "" in stops:
        raise FieldError("a stop string must not be empty")
    return stops


def _as_biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise FieldError("must be an object of token ids and numbers", "invalid_type")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 20):
            raise FieldError(f"the names of logit_bias must be token ids, got {ascii(key)[:40]}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise FieldError("the values of logit_bias must be numbers between -100 and 100")
        biases[int(key)] = float(bias)
    return biases


_STOP_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_BIAS_SCHEMA = {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
JsonSchema = Annotated[Any, WithJsonSchema({"type": ["object", "boolean", "string"]})]
"""A JSON schema, or its text."""
Choices = Annotated[list[str], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Request):
    """`include_usage` ends a stream with a chunk that counts tokens; padding of chunks is not made."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(Request):
    """A named JSON schema; answers keep to it whether `strict` is set or not."""

    name: Label
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Request):
    """What the text must keep to; exactly one of these."""

    json_: JsonSchema = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False


class SamplingRequest(Request):
    """The fields in common.

    `cache_salt` parts cached prefixes; a lower `priority` runs first; what takes longer than `deadline_s` seconds is
    answered with 504; `user` and `safety_identifier` go into the log.
    """

    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: Int64 | None = None
    stop: Annotated[list[str], BeforeValidator(_as_stops), WithJsonSchema(_STOP_SCHEMA)] = Field(default=[])
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] = Field(default=[])
    logit_bias: Annotated[dict[int, float], BeforeValidator(_as_biases), WithJsonSchema(_BIAS_SCHEMA)] = Field(
        default={}
    )
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    return_token_ids: bool = False
    priority: Int64 = 0
    cache_salt: Label = ""
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None


HANDED_ON = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "prompt_logprobs",
)
"""Fields that `SamplingParams` takes as they are."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "metadata": ({},),
    "moderation": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""OpenAI's fields that both routes refuse, with the values that ask for nothing."""
