"""What goes into one call of a compiled step and what comes out: the contract of the engine and the compiler.

Knows neither of them. The one idea: a step is rectangular (each of R rows has T / R tokens of one request), so that
prefill, chunks and decode are shapes of one function and not functions of their own.
"""

from __future__ import annotations

import dataclasses
from typing import no_type_check

import jax
import numpy as np
from jax import Array
from jaxtyping import Float32, Int32


@no_type_check  # tree utilities rebuild it around shapes, specs and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The tokens of one step, in R rows, and where the caches of their requests lie.

    Invariants: T is a multiple of R; row r holds tokens `r * T // R` to `(r + 1) * T // R`, of which the first
    `num_new[r]` are valid. The rest, like every token of an idle row (`num_new[r] == 0`), leaves no trace, whatever
    pages and slot the row names. A page that a step writes is named by rows of one request only; pages that are only
    read may be shared. A request has one row; in a 'ragged' program it may have several, at consecutive positions, of
    which all but the last are full.

    Attributes:
      tokens: Token ids; 0 where not valid.
      num_new: Valid tokens of each row in this step.
      page_table: Pages of each row's request, in order of position; what lies past the pages it needs is not used and
        may name any page.
      cache_len: Tokens of the request that lie before this row, in the cache or in earlier rows of this step; at 0
        whatever the pages and the carried states hold is left over from another request and is not read.
      slots: Where each row's request keeps its windows and carried values, below `max_num_seqs`.
      targets: The token that follows each token in the prompt, for `score`; 0 where there is none.
    """

    tokens: Int32[Array | np.ndarray, " T"]
    num_new: Int32[Array | np.ndarray, " R"]
    page_table: Int32[Array | np.ndarray, "R M"]
    cache_len: Int32[Array | np.ndarray, " R"]
    slots: Int32[Array | np.ndarray, " R"]
    targets: Int32[Array | np.ndarray, " T"]


@no_type_check  # tree utilities rebuild it around shapes, specs and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreOutputs:
    """Log-probabilities of given tokens, a row each, and the K most likely tokens beside them.

    Attributes:
      logprobs: Natural logarithm of the probability of `targets`.
      ranks: 1 when no token is more likely than the target.
      top_ids: The K most likely tokens, most likely first.
      top_logprobs: Their log-probabilities.
    """

    logprobs: Float32[Array | np.ndarray, " T"]
    ranks: Int32[Array | np.ndarray, " T"]
    top_ids: Int32[Array | np.ndarray, "T K"]
    top_logprobs: Float32[Array | np.ndarray, "T K"]


def _no_hidden() -> np.ndarray:
    """What a sampler says of hidden values, which it never sees."""
    return np.zeros((0, 0), np.float32)


@no_type_check  # tree utilities rebuild it around shapes, specs and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """The token sampled for each row after its last valid token. Idle rows hold anything.

    Attributes:
      ids: Sampled tokens.
      logprobs: Their log-probabilities under the model itself, before temperature, penalties and truncation.
      ranks: 1 when the model finds no token more likely.
      top_ids: The K most likely tokens under the model, most likely first.
      top_logprobs: Their log-probabilities.
      full_sorts: Times a row needed the exact fallback over the whole vocabulary.
      hidden: What the vocabulary projection reads in each row's last valid token; D is 0 where the model's last
        operation is no such projection.
      score: Log-probabilities of `StepInputs.targets`, where they were asked for.
    """

    ids: Int32[Array | np.ndarray, " R"]
    logprobs: Float32[Array | np.ndarray, " R"]
    ranks: Int32[Array | np.ndarray, " R"]
    top_ids: Int32[Array | np.ndarray, "R K"]
    top_logprobs: Float32[Array | np.ndarray, "R K"]
    full_sorts: Int32[Array | np.ndarray, " R"]
    hidden: Float32[Array | np.ndarray, "R D"] = dataclasses.field(default_factory=_no_hidden)
    score: ScoreOutputs | None = None
