"""What a user gets back, in vLLM's shape."""

from __future__ import annotations

import dataclasses


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
      finish_reason: "stop" (end of sequence, stop token or stop string), "length", or None while it runs.
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

    `prompt_logprobs` holds None for the first token, which nothing precedes, then one mapping a token.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
