"""The bodies of `/v1/chat/completions`: a conversation, which the model's template makes a prompt of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from fastgpt_jax.serving.body import FieldError
from fastgpt_jax.serving.protocol import Answer, Label, Request, Usage
from fastgpt_jax.serving.protocol_completions import PromptLogprobs
from fastgpt_jax.serving.protocol_sampling import UNSUPPORTED, SamplingRequest

_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
_LATER = ("tool_calls", "function_call", "tool_call_id", "refusal", "audio")
"""Fields of messages that nothing reads yet."""


def _as_text(content: Any) -> str:
    """Text, or parts that are text, a line each; any other part is refused."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError("must be a text or a list of parts", "invalid_type")
    return "\n".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise FieldError("a part must be an object with a type", "invalid_type")
    if part["type"] != "text":
        raise FieldError(f"content of type {ascii(part['type'])[:40]} is not supported", "unsupported_parameter")
    if not isinstance(part.get("text"), str):
        raise FieldError("a part of type 'text' must have a text", "invalid_type")
    return part["text"]


class Message(Request):
    """A turn; `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text), WithJsonSchema(_CONTENT_SCHEMA)]
    name: Label | None = None


def _as_messages(value: Any) -> Any:
    """Drops fields that ask for nothing and refuses those that nothing reads, by name."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise FieldError("must be a list of objects", "invalid_type")
    return [_as_message(message, index) for index, message in enumerate(value)]


def _as_message(message: dict[str, Any], index: int) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if value is not None}
    unknown = next((name for name in _LATER if given.get(name, []) != []), None)
    if unknown is not None:
        param = f"messages[{index}].{unknown}"
        raise FieldError(f"{param} is not supported by this server", "unsupported_parameter", param)
    if given.get("role") in ("tool", "function"):
        param = f"messages[{index}].role"
        raise FieldError(f"messages of role {given['role']!r} are not supported", "unsupported_parameter", param)
    return {name: value for name, value in given.items() if name not in _LATER}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_as_messages)]


class ChatRequest(SamplingRequest):
    """`max_completion_tokens` is `max_tokens` by its newer name; without either an answer may fill the context."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default={})


UNSUPPORTED_CHAT: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED,
    "audio": (),
    "chat_template": (),
    "function_call": ("none",),
    "functions": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (),
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class TokenizeRequest(Request):
    """Either a `prompt` or the `messages` of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default={})
    return_token_strs: bool = False


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class ChatDelta(Answer):
    """What a chunk adds; empty in the last one of a choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = None
