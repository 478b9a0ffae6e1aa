"""The certificate: that a model is causal, and that its derived step is the model, on the user's own parameters.

Causality is a matter of values, not of structure: unmasked attention derives without complaint. So every compile
compares, both sides widened to float32 and within 1e-4 of the largest logit:
  `f(t[:n]) == f(t)[:n]` at three lengths (a model of one length is tested by changing later tokens);
  prefill, chunk and decode of the derived step, its memory poisoned beforehand, against `f`.
And it counts: a decode step may cost at most 1.2 times what one more token costs the forward, so nothing is recomputed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fastgpt_jax.compiler.capture import Captured
from fastgpt_jax.compiler.causality import check_causal
from fastgpt_jax.compiler.decode_cost import check_flops, count_flops
from fastgpt_jax.compiler.forwards import Forwards, Jit
from fastgpt_jax.compiler.program import Program
from fastgpt_jax.compiler.trial_run import check_step
from fastgpt_jax.compiler.trial_tokens import compared_ids, make_trial_tokens
from passes import compat
from passes.incremental.errors import NotServable

FORWARD_FLOP_BUDGET = 2e11
"""FLOPs of the longest forward that is run: a few seconds on two cores."""


@dataclass(frozen=True)
class Certificate:
    """What was compared and how well it agreed.

    Attributes:
      lengths: Lengths at which prefixes were compared, in tokens.
      min_first_chunk: Tokens the first chunk of a request must hold; above 1 for a prefix-LM.
      worst_error: Largest difference between the derived step and the forward, relative to the largest logit.
      decode_flops: FLOPs of a decode step at capacity, without what parameters alone determine, which is made once.
      forward_flops: What one more token costs the forward there.
      expansion_flops: The part of `decode_flops` that expands cached latents (MLA), on top of the bound.
      seconds: Time the certificate took.
    """

    lengths: tuple[int, ...]
    min_first_chunk: int
    worst_error: float
    decode_flops: int
    forward_flops: int
    expansion_flops: int
    seconds: float

    @property
    def decode_ratio(self) -> float:
        """FLOPs of a decode step, without expansions, over those of one more token in the forward."""
        return (self.decode_flops - self.expansion_flops) / max(self.forward_flops, 1)


def certify(
    captured: Captured,
    program: Program,
    leaves: Sequence[Any],
    *,
    seed: int = 0,
    flop_budget: float = FORWARD_FLOP_BUDGET,
) -> Certificate:
    """Certifies a derived program.

    Args:
      leaves: The parameters, arrays.
      flop_budget: FLOPs of the longest forward that is run; above it a shorter length is tested.

    Raises:
      NotServable: the model is not causal, or the step differs from it; names the operation where it can be found.
    """
    start = time.perf_counter()
    flops = count_flops(captured, program)
    check_flops(*flops)
    try:
        checked = _compare(captured, program, leaves, seed, flop_budget, compat.quick_jit)
    except NotServable:
        # Unoptimized code may round one value twice in two ways, which a comparison with a threshold can see.
        checked = _compare(captured, program, leaves, seed, flop_budget, jax.jit)
    lengths, first_chunk, error = checked
    return Certificate(tuple(lengths), first_chunk, error, *flops, time.perf_counter() - start)


def _compare(
    captured: Captured, program: Program, leaves: Sequence[Any], seed: int, flop_budget: float, jit: Jit
) -> tuple[list[int], int, float]:
    """Returns the lengths compared, the smallest first chunk and the worst error."""
    forwards = Forwards(captured, leaves, flop_budget, jit)
    lengths = forwards.test_lengths()
    tokens, whole = _tokens_and_logits(forwards, lengths[-1], seed)
    first_chunk = check_causal(forwards, tokens, whole, lengths)
    return lengths, first_chunk, check_step(program, leaves, tokens, whole, first_chunk, jit)


def _tokens_and_logits(forwards: Forwards, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Test tokens i32 [T] and their logits f32 [T, V].

    A head may be wider than the embedding, where the last ids give no number: then smaller ids are tried.

    Raises:
      NotServable: most rows of the logits hold no number, so that comparing them would show nothing.
    """
    vocab_size, special = forwards.captured.vocab_size, compared_ids(forwards.captured)
    for ids in (vocab_size, max(vocab_size // 2, 1)):
        tokens = make_trial_tokens(length, ids, special, seed)
        whole = forwards.logits(tokens)
        numbers = np.isfinite(whole).any(axis=1)
        if numbers.all():
            return tokens, whole
    if 2 * numbers.sum() < length:
        raise NotServable(
            f"{length - int(numbers.sum())} of {length} rows of the logits hold no finite number on random tokens, so "
            "nothing can be certified; check the parameters, and that no table of positions ends before max_model_len"
        )
    return tokens, whole
