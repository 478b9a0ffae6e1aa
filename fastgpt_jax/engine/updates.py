"""What the core of the engine says of a request after a step: ids and numbers, no text."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastgpt_jax.engine.request import Request


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token's log-probability and rank, and the most likely tokens with theirs, where these are wanted."""

    token_id: int
    logprob: float
    rank: int | None = None
    top_ids: Any = ()
    top_logprobs: Any = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one continuation.

    Attributes:
      token: Its next token, if there is one.
      prompt_scores: Of the prompt tokens that were computed, in order.
      hidden: What the projection to the vocabulary read, where an embedding is wanted.
      finish_reason: Why it ended, by ids alone; None while it goes on.
      stop_reason: The stop token.
      error: What went wrong; None where nothing did.
    """

    request: Request
    token: TokenScore | None = None
    prompt_scores: tuple[TokenScore, ...] = ()
    hidden: Any = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
