"""The full sampler against a NumPy float64 reference, and its independence of the batch."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from fastgpt_jax.sampling import full, greedy
from fastgpt_jax.sampling.inputs import init_sampler_inputs
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.table import SamplerTable
from tests.sampling import reference

pytestmark = pytest.mark.usefixtures("strict_jax")
VOCAB = 40
ROWS = 4096
WIDE_VOCAB = 3000
sample = jax.jit(full.sample, static_argnums=2)


def sample_rows(logits, inputs):
    """Samples up to 8 rows at one compiled shape; the rest are idle rows of NaN."""
    num_rows = logits.shape[0]
    padded = np.full((8, WIDE_VOCAB), np.nan, np.float32)
    padded[:num_rows, : logits.shape[1]] = logits
    padded[:num_rows, logits.shape[1] :] = -np.inf
    idle = init_sampler_inputs(8, WIDE_VOCAB, 16)
    rows = jax.tree.map(lambda a, b: np.concatenate([a, b[num_rows:]]), inputs, idle)
    return jax.tree.map(lambda x: np.asarray(x)[:num_rows], sample(padded, rows, 5))


@functools.cache
def logits_row(vocab_size: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(vocab_size).normal(size=vocab_size).astype(np.float32) * spread


def inputs_for(params, prompt=(), output=(), banned=(), num_rows=ROWS, vocab_size=VOCAB):
    """Rows that ask for the same and differ in seed."""
    table = SamplerTable(num_rows, vocab_size, 16)
    for row in range(num_rows):
        history = [*prompt, *output]
        table.write(row, params, history, num_prompt=len(prompt), seed=row)
        table.ban(row, banned)
    return table.take(range(num_rows))


CASES = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.7),
    "top_k_then_top_p": SamplingParams(top_k=8, top_p=0.8, temperature=1.3),
    "min_p": SamplingParams(min_p=0.2),
    "typical": SamplingParams(typical_p=0.6),
    "all_truncations": SamplingParams(top_k=20, top_p=0.95, min_p=0.02, typical_p=0.9),
    "penalties": SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3),
    "bias": SamplingParams(logit_bias={3: 4.0, 7: -100.0, 39: 2.5}),
    "greedy": SamplingParams(temperature=0, repetition_penalty=1.8),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_follow_the_reference_distribution(name):
    params, prompt, output, banned = CASES[name], (1, 2, 2, 9), (5, 5, 30), (int(np.argmax(logits_row(VOCAB))),)
    expected = reference.distribution(logits_row(VOCAB), params, prompt, output, banned)
    logits = np.broadcast_to(logits_row(VOCAB), (ROWS, VOCAB))
    ids = np.asarray(sample(logits, inputs_for(params, prompt, output, banned), 1).ids)
    counts = np.bincount(ids, minlength=VOCAB)
    assert np.all(counts[expected == 0] == 0)
    is_likely = expected * ROWS >= 5
    expected_counts = np.append(expected[is_likely], 1 - expected[is_likely].sum()) * ROWS
    found_counts = np.append(counts[is_likely], ROWS - counts[is_likely].sum())
    has_mass = expected_counts > 1e-6 * ROWS
    chi_square = np.sum((found_counts - expected_counts)[has_mass] ** 2 / np.maximum(expected_counts[has_mass], 1))
    degrees = max(1, has_mass.sum() - 1)
    # Mean `degrees`, standard deviation sqrt(2 * degrees); five of them is beyond chance, and the seeds are fixed.
    assert chi_square <= degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("params", "full_sorts"),
    [
        (SamplingParams(top_p=0.3), 0),
        (SamplingParams(top_p=0.97), 1),
        (SamplingParams(top_k=1500), 1),
        (SamplingParams(top_k=1024), 0),
        (SamplingParams(top_k=1400, top_p=0.2), 1),
        (SamplingParams(top_k=50, top_p=0.9, typical_p=0.9), 0),
        (SamplingParams(top_p=0.95, typical_p=0.97), 2),
        (SamplingParams(), 0),
    ],
)
def test_wide_sets_equal_a_full_sort_and_are_counted(params, full_sorts):
    row = logits_row(WIDE_VOCAB, spread=0.7)
    expected = reference.distribution(row, params) > 0
    kept, sorts = truncate_rows(row[None], inputs_for(params, num_rows=1, vocab_size=WIDE_VOCAB))
    assert np.asarray(sorts).tolist() == [full_sorts]
    # float32 sums may put a token that ends within 1e-6 of the mass on the other side of the cut; counts are exact.
    slack = 1 if params.top_p < 1 or params.typical_p < 1 else 0
    assert np.sum(np.asarray(kept)[0] != expected) <= slack


@jax.jit
def truncate_rows(logits, inputs):
    return full.truncate(logits, inputs, inputs.temperature > 0)


def test_ties_at_the_cut_keep_the_lowest_ids():
    logits = np.zeros((1, WIDE_VOCAB), np.float32)
    logits[0, ::2] = -0.0
    for top_k in (7, 1300):
        inputs = inputs_for(SamplingParams(top_k=top_k), num_rows=1, vocab_size=WIDE_VOCAB)
        kept, sorts = truncate_rows(logits, inputs)
        assert np.flatnonzero(np.asarray(kept)[0]).tolist() == list(range(top_k))
        assert int(sorts[0]) == (top_k > 1024)


def test_a_row_does_not_depend_on_the_others():
    table = SamplerTable(8, WIDE_VOCAB, 16)
    mixture = [
        SamplingParams(),
        SamplingParams(top_p=0.9, temperature=3.0),
        SamplingParams(top_p=0.5),
        SamplingParams(temperature=0),
        SamplingParams(top_k=1500, typical_p=0.9),
        SamplingParams(repetition_penalty=1.3, logit_bias={4: 1.0}),
        SamplingParams(typical_p=0.5),
        SamplingParams(top_k=3, min_p=0.1),
    ]
    logits = np.random.default_rng(0).normal(size=(8, WIDE_VOCAB)).astype(np.float32)
    for row, params in enumerate(mixture):
        table.write(row, params, [1, 2, 3 + row], num_prompt=2, seed=row)
    together = sample_rows(logits, table.take(range(8)))
    assert together.full_sorts.sum() > 0
    for row in range(8):
        alone = sample_rows(logits[[row]], table.take([row]))
        assert alone.ids[0] == together.ids[row]
        assert alone.full_sorts[0] == together.full_sorts[row]


def test_seed_and_step_decide_the_draw():
    draws = []
    for seed, output in ((1, [3]), (1, [9]), (1, [3, 3]), (2, [3]), (2**32 + 1, [3])):
        table = SamplerTable(1, WIDE_VOCAB, 16)
        table.write(0, SamplingParams(), [1, *output], num_prompt=1, seed=seed)
        draws.append(int(sample_rows(np.zeros((1, WIDE_VOCAB), np.float32), table.take([0])).ids[0]))
    assert draws[0] == draws[1]
    assert len({draws[0], draws[2], draws[3], draws[4]}) == 4


def test_idle_rows_never_trigger_the_fallback_even_on_nan():
    logits = np.full((2, WIDE_VOCAB), np.nan, np.float32)
    logits[1] = logits_row(WIDE_VOCAB)
    table = SamplerTable(1, WIDE_VOCAB, 16)
    table.write(0, SamplingParams(top_k=3), [1], num_prompt=1, seed=0)
    out = sample_rows(logits, table.take([None, 0]))
    assert out.full_sorts.tolist() == [0, 0]
    assert 0 <= out.ids[0] < WIDE_VOCAB
    assert out.ids[1] in np.argsort(-logits[1])[:3]


def test_history_outside_the_vocabulary_is_ignored():
    params = SamplingParams(temperature=0, repetition_penalty=100.0)
    inputs = inputs_for(params, prompt=(0, 0), num_rows=1, vocab_size=WIDE_VOCAB)
    inputs.history[0, :2] = (WIDE_VOCAB + 5, -1)
    row = logits_row(WIDE_VOCAB)
    assert sample_rows(row[None], inputs).ids[0] == np.argmax(row)


def test_greedy_and_full_agree_at_temperature_zero():
    logits = np.random.default_rng(1).normal(size=(8, WIDE_VOCAB)).astype(np.float32)
    neutral = init_sampler_inputs(8, WIDE_VOCAB, 16)
    jax.tree.map(
        np.testing.assert_array_equal,
        sample_rows(logits, neutral),
        jax.tree.map(np.asarray, jax.jit(greedy.sample, static_argnums=2)(logits, neutral, 5)),
    )


def depths_of_sorts(jaxpr, depth=0):
    """Yields, for every sort, how many `cond` branches it lies in."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sort":
            yield depth
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from depths_of_sorts(inner, depth + (eqn.primitive.name == "cond"))


def test_sorts_lie_only_in_the_branch_of_the_fallback():
    jaxpr = jax.make_jaxpr(lambda x, i: full.sample(x, i, 20))(
        np.zeros((2, 5000), np.float32), init_sampler_inputs(2, 5000, 16)
    )
    # Inside "some row is random", "some row truncates" and "some row was not found among the first 1024".
    assert list(depths_of_sorts(jaxpr.jaxpr)) == [3, 3]


def test_banned_tokens_can_be_allowed_again():
    row = logits_row(WIDE_VOCAB)
    table = SamplerTable(1, WIDE_VOCAB, 16)
    table.write(0, SamplingParams(temperature=0), [1], num_prompt=1, seed=0)
    table.ban(0, [int(np.argmax(row))])
    assert sample_rows(row[None], table.take([0])).ids[0] == np.argsort(-row)[1]
    table.allow_all(0)
    assert sample_rows(row[None], table.take([0])).ids[0] == np.argmax(row)


EXTREMES = [
    {"temperature": 1e6},
    {"temperature": 1e-4, "repetition_penalty": 1e-3},
    {"repetition_penalty": 1e3, "min_p": 1e-300},
    {"top_p": 5e-324, "typical_p": 5e-324, "top_k": 2**62},
    {"temperature": 0.0, "repetition_penalty": 1e-3, "logit_bias": {3: 100.0, 35: -100.0}},
]


@pytest.mark.parametrize("extremes", EXTREMES, ids=str)
def test_a_forbidden_token_is_never_drawn_at_the_ends_of_the_ranges(extremes):
    banned = range(30)
    inputs = inputs_for(SamplingParams(**extremes), [1, 2], [3], banned, num_rows=8, vocab_size=WIDE_VOCAB)
    for seed in range(4):
        logits = np.random.default_rng(seed).normal(size=(8, VOCAB)).astype(np.float32) * 20
        logits[:, 3] = 0.0
        assert not set(sample_rows(logits, inputs).ids.tolist()) & set(banned)
