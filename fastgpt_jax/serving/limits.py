"""How much a request may ask for, checked before anything is allocated for it.

Knows no engine. The one idea: every limit is a number of `ServerSettings`, and a request above one is refused with the
number; size and depth of a body are checked while it is read (`body.py`), the queue when a request is let in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fastgpt_jax.serving.errors import ApiError
from fastgpt_jax.serving.protocol_sampling import SamplingRequest
from fastgpt_jax.serving.settings import ServerSettings


def check_sampling(request: SamplingRequest, num_prompts: int, settings: ServerSettings) -> None:
    """Checks what completions and chats share."""
    check_most("prompt", "prompts", num_prompts, settings.max_prompts)
    check_most("n", "continuations", request.n, settings.max_n)
    check_most("n", "prompts times n", num_prompts * request.n, settings.max_sequences)
    check_most("stop", "stop strings", len(request.stop), settings.max_stop_strings)
    check_most("stop", "characters in a stop string", max(map(len, request.stop), default=0), settings.max_stop_chars)
    check_most("stop_token_ids", "stop tokens", len(request.stop_token_ids), settings.max_logit_bias)
    check_most("logit_bias", "entries", len(request.logit_bias), settings.max_logit_bias)


def check_messages(body: Mapping[str, Any], settings: ServerSettings) -> None:
    """Checks how many messages a body has, before one of them is looked at."""
    messages = body.get("messages")
    if isinstance(messages, list):
        check_most("messages", "messages", len(messages), settings.max_messages)


def check_schema(param: str, constraint: Any, settings: ServerSettings) -> None:
    """Checks the size of a JSON schema, regular expression, grammar or list of choices."""
    text = constraint if isinstance(constraint, str) else json.dumps(constraint, ensure_ascii=False)
    check_most(param, "bytes", len(text.encode(errors="replace")), settings.max_schema_bytes)


def check_most(param: str, what: str, found: int, most: int) -> None:
    """Raises ApiError where there is more of something than may be."""
    if found > most:
        raise ApiError("limit_exceeded", f"{param}: at most {most} {what} are allowed, got {found}", param)


def check_context(param: str, lengths: Iterable[int], max_tokens: int | None, max_model_len: int) -> None:
    """Checks that prompts leave room for what they ask for, and for one token where they ask for nothing."""
    longest = max(lengths)
    if longest + (max_tokens or 1) > max_model_len:
        asked = f"{max_tokens} tokens were asked for" if max_tokens else "one more token is needed"
        raise ApiError(
            "context_length_exceeded",
            f"the context holds {max_model_len} tokens; the prompt has {longest} and {asked}",
            param,
        )


def check_vocabulary(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises ApiError for an id that no token has."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        message = f"{param}: token id {largest} is outside the vocabulary of {vocab_size} tokens"
        raise ApiError("invalid_value", message, param)
