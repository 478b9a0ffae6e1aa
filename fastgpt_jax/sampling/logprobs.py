"""Log-probabilities of tokens under the raw distribution of the model, their ranks, and the most likely tokens.

The one idea: only the row's log-sum-exp is computed over the vocabulary; ranks and the top come from the logits,
which order tokens as their probabilities do, so no [T, V] array of log-probabilities is made.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from fastgpt_jax.sampling.step_io import ScoreOutputs, StepOutputs


def score(logits: Float[Array, "T V"], targets: Int32[Array, " T"], max_logprobs: int) -> ScoreOutputs:
    """Returns log-probability and rank of each row's target, and the row's `min(max_logprobs, V)` most likely tokens.

    The rank is one more than the number of tokens strictly more likely than the target. Targets outside the
    vocabulary are clamped into it.
    """
    logits = logits.astype(jnp.float32)
    vocab_size = logits.shape[1]
    targets = jnp.clip(targets, 0, vocab_size - 1)
    log_mass = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)
    top_logits, top_ids = jax.lax.top_k(logits, min(max_logprobs, vocab_size))
    return ScoreOutputs(
        logprobs=(chosen - log_mass)[:, 0],
        ranks=1 + jnp.sum(logits > chosen, axis=1, dtype=jnp.int32),
        top_ids=top_ids,
        top_logprobs=top_logits - log_mass,
    )


def describe(
    logits: Float[Array, "R V"], ids: Int32[Array, " R"], full_sorts: Int32[Array, " R"], max_logprobs: int
) -> StepOutputs:
    """Returns the outputs of a step that sampled `ids` from these raw logits."""
    scores = score(logits, ids, max_logprobs)
    return StepOutputs(
        ids=ids,
        logprobs=scores.logprobs,
        ranks=scores.ranks,
        top_ids=scores.top_ids,
        top_logprobs=scores.top_logprobs,
        full_sorts=full_sorts,
    )
