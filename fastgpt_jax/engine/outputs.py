"""What a user gets back, in vLLM's shape."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float32

from fastgpt_jax.engine.stats import RequestMetrics


@dataclasses.dataclass(frozen=True)
class Logprob:
    """One token's natural log-probability under the model; `rank` is 1 for the most likely token."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt, so far or whole.

    Attributes:
      index: Which of the `n` continuations.
      text: What can no longer change: while the request runs, a suffix that may turn out to begin a stop string is
        held back. Empty for models without a tokenizer.
      token_ids: Generated tokens, including one that ended the request.
      cumulative_logprob: Sum of the tokens' log-probabilities.
      logprobs: Per generated token its own and the most likely tokens' log-probabilities; None where not asked for.
      finish_reason: "stop" (end of sequence, stop token or stop string), "length", "abort", "deadline" (it took longer
        than it was given), "error" (a step failed, or the tokenizer did), or None while it runs.
      stop_reason: The stop string or stop token id that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuations.

    Attributes:
      prompt_logprobs: None for the first token, which nothing precedes, then one mapping a token.
      metrics: When things happened to it; not part of what makes two outputs equal.
      error: What went wrong where a finish reason is "error"; for logs, not for strangers.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics = dataclasses.field(default=RequestMetrics(0.0), compare=False)
    error: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingOutput:
    """A prompt as a vector.

    Attributes:
      embedding: What the projection to the vocabulary reads after the last token of the prompt, at length 1 (L2).
    """

    request_id: str
    embedding: Float32[np.ndarray, " D"]
    prompt_token_ids: tuple[int, ...]
    finished: bool = True
    metrics: RequestMetrics = RequestMetrics(0.0)
