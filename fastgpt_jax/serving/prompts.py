"""From the prompts of a request to token ids, without holding up others.

Knows no body of a request. The one idea: a short text is encoded at once, and a long one on another thread, so that a
megabyte of text delays nobody's health check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.limits import check_vocabulary
from fastgpt_jax.serving.protocol_chat import Message
from fastgpt_jax.serving.sampling_request import named_error
from fastgpt_jax.serving.state import Server
from fastgpt_jax.tokenizer.chat_prompt import encode_chat
from fastgpt_jax.tokenizer.chat_template import ChatTemplate

SHORT_CHARS = 2048
Result = TypeVar("Result")
Encoded = tuple[str | None, list[int]]
"""A prompt's text, where there is any, and its ids."""


async def encode_prompts(
    server: Server, param: str, prompts: Sequence[str | list[int]], *, may_be_empty: bool = False, **options: bool
) -> list[Encoded]:
    """Encodes texts and passes ids on, which must lie in the vocabulary.

    Args:
      may_be_empty: Whether a text may have no token at all.
      options: Of `Tokenizer.encode`.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    tokenizer = server.llm.tokenizer
    if texts and tokenizer is None:
        raise ApiError("tokenizer_missing", f"the model has no tokenizer, so {param} must be token ids", param)

    def encode_all() -> list[Encoded]:
        return [
            (prompt, _encode(tokenizer, prompt, options)) if isinstance(prompt, str) else (None, prompt)
            for prompt in prompts
        ]

    encoded = await _aside(server, sum(map(len, texts)), encode_all)
    for _, token_ids in encoded:
        if not token_ids and not may_be_empty:
            raise ApiError("invalid_value", f"{param} is empty; give some text", param)
        check_vocabulary(param, token_ids, server.llm.vocab_size)
    return encoded


async def encode_messages(
    server: Server, messages: Sequence[Message], *, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> Encoded:
    """The prompt that the model's template makes of a conversation."""
    template, tokenizer = server.template, server.llm.tokenizer
    if template is None or tokenizer is None:
        raise ApiError(
            "chat_template_missing",
            "the model has no chat template; use /v1/completions, or serve a model that has one",
            "messages",
        )

    def encode() -> Encoded:
        return encode_turns(template, tokenizer, messages, add_generation_prompt, variables)

    num_chars = sum(len(turn.content) for turn in messages)
    try:
        text, token_ids = await _aside(server, num_chars, lambda: named_error(encode, {}))
    except ApiError as error:
        raise ApiError("chat_template_refused", error.message, "messages") from None
    if not token_ids:
        raise ApiError("invalid_value", "the messages make an empty prompt", "messages")
    return text, token_ids


def encode_turns(
    template: ChatTemplate,
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> Encoded:
    """The same, at once."""
    turns = [
        {"role": "system" if turn.role == "developer" else turn.role, "content": turn.content}
        | ({} if turn.name is None else {"name": turn.name})
        for turn in messages
    ]
    return encode_chat(template, tokenizer, turns, add_generation_prompt=add_generation_prompt, variables=variables)


async def _aside(server: Server, num_chars: int, work: Callable[[], Result]) -> Result:
    return work() if num_chars <= SHORT_CHARS else await server.llm.aside(work)


def _encode(tokenizer: Any, text: str, options: Mapping[str, bool]) -> list[int]:
    """Ids of a text, by our tokenizer or by a user's own, which takes no options."""
    if hasattr(tokenizer, "detokenizer"):
        return tokenizer.encode(text, **options)
    encoded = tokenizer.encode(text)
    return [int(i) for i in getattr(encoded, "ids", encoded)]
