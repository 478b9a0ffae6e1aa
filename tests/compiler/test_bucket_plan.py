"""Bucket plans: everything is served, the choice is the best there is, and a bucket that does not pay is not made."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.compiler.bucket_plan import MIN_GAIN, Traffic, computed_rows, fit_buckets, plan_buckets
from fastgpt_jax.errors import UserError

WEIGHTS = st.dictionaries(st.integers(1, 24), st.floats(0, 100), max_size=8)


@st.composite
def requests(draw):
    """Arguments of `plan_buckets`."""
    max_model_len = draw(st.integers(2, 3000))
    max_num_seqs = draw(st.integers(1, 40))
    prompts = draw(st.dictionaries(st.integers(1, max_model_len - 1), st.floats(0, 1e6), max_size=6))
    concurrency = draw(st.dictionaries(st.integers(1, 60), st.floats(0, 1e6), max_size=6))
    sizes = st.lists(st.integers(1, max_model_len), max_size=4)
    return {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": draw(st.integers(1, 5000)),
        "min_first_chunk": draw(st.sampled_from([1, 1, max_model_len, draw(st.integers(1, max_model_len))])),
        "chunk_lens": draw(st.none() | sizes),
        "decode_rows": draw(st.none() | st.lists(st.integers(1, max_num_seqs), max_size=4)),
        "traffic": draw(st.none() | st.just(Traffic(prompts, concurrency))),
    }


@settings(max_examples=150, deadline=None)
@given(requests())
def test_every_prompt_and_every_concurrency_is_served(asked):
    plan = plan_buckets(**asked)
    lens, rows = plan.buckets.chunk_lens, plan.buckets.decode
    assert list(rows) == sorted(set(rows)) and rows[0] >= 1 and rows[-1] == asked["max_num_seqs"]
    assert all(plan.buckets.decode_rows(n) >= n for n in range(1, asked["max_num_seqs"] + 1))
    assert asked["min_first_chunk"] <= lens[-1] <= asked["max_model_len"] and lens[0] >= 1
    for length in lens:
        counts = plan.buckets.prefill_rows(length)
        assert counts[0] == 1 and list(counts) == sorted(set(counts)) and counts[-1] <= asked["max_num_seqs"]
        assert len(counts) == 1 or counts[-1] * length <= asked["max_num_batched_tokens"]
    for prompt in {1, lens[0], lens[-1], asked["max_model_len"] - 1}:
        assert prompt <= computed_rows(prompt, lens) < prompt + lens[-1]
    assert 0 <= plan.prefill_waste < 1 and 0 <= plan.decode_waste < 1


@settings(max_examples=50, deadline=None)
@given(requests())
def test_a_step_that_the_scheduler_may_ask_for_has_its_entry_points(asked):
    plan = plan_buckets(**asked)
    keys = set(plan.buckets.keys())
    assert len(keys) == plan.num_entry_points
    for chunk_len, rows in [*plan.buckets.prefill, *((1, rows) for rows in plan.buckets.decode)]:
        for variant in ("greedy", "full"):
            assert EntryPointKey(chunk_len * rows, rows, variant, False) in keys


@settings(max_examples=150, deadline=None)
@given(WEIGHTS.filter(lambda w: any(w.values())), st.sets(st.integers(1, 24), max_size=6), st.integers(1, 5))
def test_dynamic_programming_equals_trying_everything(weights, candidates, max_buckets):
    candidates = sorted({*candidates, 24})
    found = fit_buckets(weights, candidates, max_buckets=max_buckets, min_gain=0)
    choices = (
        [*others, 24]
        for count in range(min(max_buckets, len(candidates)))
        for others in itertools.combinations(candidates[:-1], count)
    )
    least = min(rows_computed(weights, choice) for choice in choices)
    assert set(found) <= set(candidates) and len(found) <= max_buckets and found == sorted(found) and found[-1] == 24
    assert rows_computed(weights, found) == pytest.approx(least)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS.filter(lambda w: any(w.values())), st.floats(0, 0.5))
def test_the_last_bucket_pays_and_no_other_would(weights, min_gain):
    found = fit_buckets(weights, range(1, 25), min_gain=min_gain)
    least = {
        count: rows_computed(weights, fit_buckets(weights, range(1, 25), max_buckets=count, min_gain=0))
        for count in (len(found) - 1, len(found), len(found) + 1)
        if count
    }
    needed = min_gain * sum(number * weight for number, weight in weights.items())
    assert len(found) == 1 or least[len(found) - 1] - least[len(found)] >= needed * (1 - 1e-9)
    assert len(found) == 8 or least[len(found)] - least[len(found) + 1] <= needed * (1 + 1e-9)


def rows_computed(weights, sizes):
    return sum(weight * computed_rows(number, sizes) for number, weight in weights.items())


def test_a_prefill_of_one_token_is_a_decode_step_and_has_its_entry_points():
    plan = plan_buckets(64, 6, 4, 1, chunk_lens=[1, 8], decode_rows=[3])
    assert plan.buckets.decode == (1, 3, 6) and plan.buckets.prefill_rows(1) == (1,)  # 4 rows would have no decode step
    assert EntryPointKey(1, 1, "greedy", False) in set(plan.buckets.keys())


def test_what_is_chosen_without_traffic():
    plan = plan_buckets(600, 6, 1024, 1)
    assert plan.buckets.prefill == ((16, 1), (16, 6), (64, 1), (64, 6), (256, 1), (256, 4))
    assert plan.buckets.decode == (1, 2, 4, 6)
    assert plan.num_entry_points == 4 * 2 + 6 * 3
    assert plan.prefill_basis == "prompts log-uniform from 1 to 600 tokens"
    assert plan_buckets(5, 1, 64, 1).buckets.chunk_lens == (5,)
    assert plan_buckets(500, 1, 64, 300).buckets.chunk_lens == (16, 64, 256, 300)


def test_traffic_decides_where_the_buckets_lie():
    plan = plan_buckets(4096, 16, 2048, 1, traffic=Traffic({100: 50, 33: 50}, {3: 1, 16: 1}))
    assert plan.buckets.chunk_lens == (40, 104) and plan.buckets.decode == (3, 16)
    assert plan.prefill_waste == pytest.approx(1 - 133 / 144) and plan.decode_waste == 0
    assert plan.prefill_basis == "the prompts of the traffic"


def test_a_long_prompt_counts_as_whole_chunks_and_a_rest():
    plan = plan_buckets(4096, 1, 2048, 1, traffic=Traffic({2 * 1024 + 20: 1}))
    assert plan.buckets.chunk_lens == (24, 1024) and plan.prefill_waste == pytest.approx(1 - 2068 / 2072)
    plan = plan_buckets(16384, 1, 2048, 1, traffic=Traffic({10 * 1024 + 512: 1}))
    assert plan.buckets.chunk_lens == (1024,)  # 512 of 10752 tokens saved are below 5 %


def test_a_bucket_that_saves_little_is_not_made():
    rare = Traffic({1000: 1000, 8: 1})
    assert plan_buckets(2048, 1, 2048, 1, traffic=rare).buckets.chunk_lens == (1000,)
    assert (1000 - 8) / (1000 * 1000) < MIN_GAIN


def test_prompts_that_cannot_be_served_do_not_count():
    plan = plan_buckets(64, 1, 2048, 1, traffic=Traffic({9: 1, 64: 1000, 5000: 7}))
    assert plan.buckets.chunk_lens == (16,)
    with pytest.raises(UserError, match="every prompt of the traffic has 64 tokens or more"):
        plan_buckets(64, 1, 2048, 1, traffic=Traffic({64: 1}))


def test_more_requests_than_run_together_count_as_all():
    assert plan_buckets(64, 4, 2048, 1, traffic=Traffic({}, {1: 10, 99: 10})).decode_waste == 0


def test_given_buckets_are_kept_and_impossible_ones_refused():
    plan = plan_buckets(64, 4, 2048, 20, chunk_lens=[12, 4], decode_rows=[3], traffic=Traffic({5: 1}, {1: 1}))
    assert plan.buckets.chunk_lens == (4, 12, 20) and plan.buckets.decode == (3, 4)
    with pytest.raises(UserError, match="from 1 to max_model_len=64, got 65"):
        plan_buckets(64, 4, 2048, 1, chunk_lens=[65])
    with pytest.raises(UserError, match="from 1 to max_num_seqs=4, got 0"):
        plan_buckets(64, 4, 2048, 1, decode_rows=[0])
