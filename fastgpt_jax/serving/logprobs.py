"""Log-probabilities in the two forms that OpenAI gave them, and in vLLM's for prompts.

Knows no engine and no route. The one idea: a token is told by its text as the vocabulary has it, special tokens
included; where two tokens have one text, the likelier one is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastgpt_jax.engine.outputs import Logprob

LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON does not have; OpenAI's own choice."""

Row = Mapping[int, Logprob] | None
"""A token's own log-probability and those of the likeliest; None where nothing precedes the token."""


def completion_logprobs(
    token_ids: Sequence[int], rows: Sequence[Row], num_top: int, tokenizer: Any, text_offset: int = 0
) -> dict[str, Any]:
    """Four lists of one entry a token.

    Args:
      num_top: How many of the likeliest tokens were asked for, beside the token itself.
      text_offset: Where the first token's text begins.
    """
    tokens = [token_text(token_id, row, tokenizer) for token_id, row in zip(token_ids, rows, strict=True)]
    offsets = []
    for token in tokens:
        offsets.append(text_offset)
        text_offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [
            None if row is None else _finite(row[i].logprob) for i, row in zip(token_ids, rows, strict=True)
        ],
        "tokens": tokens,
        "top_logprobs": [
            None if row is None else _by_text(token_id, row, num_top, tokenizer)
            for token_id, row in zip(token_ids, rows, strict=True)
        ],
    }


def chat_logprobs(
    token_ids: Sequence[int], rows: Sequence[Row], num_top: int, tokenizer: Any, token_bytes: Sequence[bytes] | None
) -> dict[str, Any]:
    """A list of one object a token.

    Args:
      token_bytes: What each id adds to a text; None where that is not known.
    """

    def describe(token_id: int, one: Logprob) -> dict[str, Any]:
        text = token_text(token_id, {token_id: one}, tokenizer)
        spelled = token_bytes[token_id] if token_bytes is not None and token_id < len(token_bytes) else b""
        return {"token": text, "logprob": _finite(one.logprob), "bytes": list(spelled or text.encode())}

    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        known = row or {}
        likeliest = sorted((one.rank, i) for i, one in known.items() if one.rank <= num_top)[:num_top]
        top = [describe(i, known[i]) for _, i in likeliest]
        content.append({**describe(token_id, known[token_id]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def prompt_logprobs(rows: Sequence[Row]) -> list[dict[str, Any] | None]:
    """vLLM's form: an object a prompt token, by ids; None for the first."""
    return [
        None
        if row is None
        else {
            str(i): {"logprob": _finite(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
            for i, one in row.items()
        }
        for row in rows
    ]


def prompt_text(token_ids: Sequence[int], tokenizer: Any) -> str:
    """The text of a prompt that came as ids; empty for models without a tokenizer."""
    if tokenizer is None:
        return ""
    is_ours = hasattr(tokenizer, "detokenizer")
    return tokenizer.decode(list(token_ids), **({"skip_special_tokens": False} if is_ours else {}))


def token_text(token_id: int, row: Row, tokenizer: Any) -> str:
    """A token's text; its id in words for models without a tokenizer."""
    text = row[token_id].decoded_token if row else None
    if text is None and tokenizer is not None:
        text = prompt_text([token_id], tokenizer)
    return f"token_id:{token_id}" if text is None else text


def _by_text(token_id: int, row: Mapping[int, Logprob], num_top: int, tokenizer: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for i, one in row.items():
        if i == token_id or one.rank <= num_top:
            text = token_text(i, row, tokenizer)
            found[text] = max(found.get(text, LEAST), _finite(one.logprob))
    return found


def _finite(value: float) -> float:
    return max(value, LEAST) if math.isfinite(value) else LEAST
