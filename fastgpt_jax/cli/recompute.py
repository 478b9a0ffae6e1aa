"""The baseline that the demo prints beside the served model: the whole forward again for every token.

Knows only `logits = fn(params, tokens)`. The one idea is to be fair: the forward is jitted, runs at the smallest of a
few padded lengths (what follows a token cannot change a causal model's answer), is compiled before the clock starts
and never traced while it runs, and only one token id leaves the device at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PADDED_LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 2048, 4096)


class Recompute:
    """Greedy generation without a cache. Invariant: every padded length in `lengths` is compiled."""

    def __init__(
        self, fn: Callable[[Any, Int[Array, "B T"]], Float[Array, "B T V"]], params: Any, *, max_model_len: int
    ):
        self.lengths = (*(length for length in PADDED_LENGTHS if length < max_model_len), max_model_len)
        self._params = params

        @jax.jit
        def next_token(params: Any, tokens: Int[Array, "1 T"], num_tokens: Int[Array, ""]) -> Int[Array, ""]:
            logits = fn(params, tokens)
            return jnp.argmax(jax.lax.dynamic_index_in_dim(logits[0], num_tokens - 1, keepdims=False))

        self._next_token = next_token
        for length in self.lengths:
            self._next_token(params, np.zeros((1, length), np.int32), np.int32(1)).block_until_ready()

    def generate(self, prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The `num_tokens` most likely tokens, one after the other, after the prompt."""
        ids = list(prompt_token_ids)
        for _ in range(num_tokens):
            length = next(length for length in self.lengths if length >= len(ids))
            tokens = np.zeros((1, length), np.int32)
            tokens[0, : len(ids)] = ids
            ids.append(int(self._next_token(self._params, tokens, np.int32(len(ids)))))
        return ids[len(prompt_token_ids) :]
