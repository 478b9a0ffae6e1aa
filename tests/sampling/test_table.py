"""The table of sampler rows: what a slot forbids and allows, and that a cleared slot leaves no trace."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.table import SamplerTable


def allowed(table, slot):
    bits = table.take([slot]).allowed_bits[0]
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def mask(ids):
    bits = np.zeros(2, np.uint32)
    for token_id in ids:
        bits[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return bits


def test_a_form_and_the_bans_before_min_tokens_hold_together():
    table = SamplerTable(2, 40, 8)
    table.write(0, SamplingParams(), [1], num_prompt=1, seed=0)
    table.restrict(0, mask([3, 31, 39]), [39, 5])
    assert allowed(table, 0) == [3, 31]
    table.restrict(0, mask([3, 4]))
    assert allowed(table, 0) == [3, 4]
    assert allowed(table, 1) == list(range(64))


def test_the_bans_yield_where_the_form_allows_nothing_else():
    table = SamplerTable(1, 40, 8)
    table.restrict(0, mask([39]), [39])
    assert allowed(table, 0) == [39]


def test_a_form_is_not_changed_and_leaves_no_trace():
    table, bits = SamplerTable(1, 40, 8), mask([3, 39])
    neutral = table.take([None])
    table.write(0, SamplingParams(top_k=3, logit_bias={2: 1.0}), [1, 2], num_prompt=2, seed=1 << 40)
    table.restrict(0, bits, [39])
    table.append(0, 3)
    assert bits.tolist() == mask([3, 39]).tolist()
    table.clear(0)
    for field in dataclasses.fields(SamplerInputs):
        assert np.array_equal(getattr(table.take([0]), field.name), getattr(neutral, field.name)), field.name
