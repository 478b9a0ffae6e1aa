"""The bodies of `/v1/completions`: a prompt as it stands, continued."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastgpt_jax.serving.protocol import Answer, Prompts, Usage
from fastgpt_jax.serving.protocol_sampling import UNSUPPORTED, SamplingRequest


class CompletionRequest(SamplingRequest):
    """`prompt` is a text, a list of texts, token ids, or a list of these; special tokens that a text spells count.

    With `echo` a text begins with its prompt, and `logprobs` with the prompt's. `max_tokens` of 0 generates nothing.
    """

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False


UNSUPPORTED_COMPLETIONS: dict[str, tuple[Any, ...]] = {**UNSUPPORTED, "best_of": (1,), "suffix": ("",)}


class PromptLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""A mapping a prompt token, from ids to log-probabilities; None for the first, which nothing precedes."""


class CompletionLogprobs(Answer):
    """Four lists of one entry a token; the first token of an echoed prompt has no log-probability."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer):
    """A whole answer, or a chunk of one: `usage` is null in chunks before the last, and absent where not asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: Usage | None = None
