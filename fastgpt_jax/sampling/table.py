"""The sampler's inputs of every slot, kept in NumPy and changed by a few numbers a step.

The one idea: a request's row is written once when it gets its slot and grows by one token a step, so that preparing a
step costs no Python loop over histories. The table has one row more than there are slots, always neutral, for the
idle rows of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt32

from fastgpt_jax.sampling.inputs import SamplerInputs, init_sampler_inputs
from fastgpt_jax.sampling.params import SamplingParams


class SamplerTable:
    """Rows of `SamplerInputs`, one per slot and a neutral one.

    Invariants: row `num_slots` is never written; a cleared row equals it.
    """

    def __init__(self, num_slots: int, vocab_size: int, max_history: int):
        self.num_slots = num_slots
        self._rows = init_sampler_inputs(num_slots + 1, vocab_size, max_history)

    def write(self, slot: int, params: SamplingParams, token_ids: Sequence[int], *, num_prompt: int, seed: int) -> None:
        """Fills a slot's row for a request whose history so far is `token_ids`; 64-bit seeds are folded to 32."""
        self.clear(slot)
        rows = self._rows
        for name in ("temperature", "top_p", "min_p", "typical_p"):
            getattr(rows, name)[slot] = getattr(params, name)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            getattr(rows, name)[slot] = getattr(params, name)
        rows.top_k[slot] = min(max(params.top_k, 0), np.iinfo(np.int32).max)
        rows.history[slot, : len(token_ids)] = token_ids
        rows.num_prompt[slot] = num_prompt
        rows.num_total[slot] = len(token_ids)
        for index, (token_id, value) in enumerate(params.logit_bias.items()):
            rows.bias_ids[slot, index] = token_id
            rows.bias_values[slot, index] = value
        rows.seeds[slot] = (seed ^ (seed >> 32)) & 0xFFFFFFFF

    def append(self, slot: int, token_id: int) -> None:
        """Adds a generated token to a slot's history."""
        self._rows.history[slot, self._rows.num_total[slot]] = token_id
        self._rows.num_total[slot] += 1

    def ban(self, slot: int, token_ids: Iterable[int]) -> None:
        """Forbids tokens, on top of those already forbidden."""
        bits = self._rows.allowed_bits[slot]
        for token_id in token_ids:
            bits[token_id // 32] &= np.uint32(0xFFFFFFFF ^ (1 << (token_id % 32)))

    def restrict(self, slot: int, allowed: UInt32[np.ndarray, " W"], banned_ids: Iterable[int] = ()) -> None:
        """Allows these tokens alone, less those that are forbidden, unless that would leave none."""
        bits = self._rows.allowed_bits
        bits[slot] = allowed
        self.ban(slot, banned_ids)
        if not bits[slot].any():
            bits[slot] = allowed

    def allow_all(self, slot: int) -> None:
        """Lifts every ban of a slot."""
        self._rows.allowed_bits[slot] = 0xFFFFFFFF

    def clear(self, slot: int) -> None:
        """Makes a slot's row neutral again."""
        for field in dataclasses.fields(SamplerInputs):
            values = getattr(self._rows, field.name)
            values[slot] = values[self.num_slots]

    def take(self, slots: Sequence[int | None], num_unseen: int = 0) -> SamplerInputs:
        """Returns a copy of the rows of these slots, neutral where None; later writes do not reach it.

        Args:
          num_unseen: Tokens that follow each history and are not in it yet.
        """
        index = np.array([self.num_slots if slot is None else slot for slot in slots])
        names = [field.name for field in dataclasses.fields(SamplerInputs)]
        rows = SamplerInputs(**{name: getattr(self._rows, name)[index] for name in names})
        rows.num_total[:] += num_unseen
        return rows
