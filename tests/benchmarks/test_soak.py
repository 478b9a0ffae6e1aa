"""What a soak finds fault with."""

from __future__ import annotations

import pytest

from benchmarks.soak import _memory_figures, _slowest, judge

FINE = {
    "num_lost": 0,
    "exit_code": 0,
    "num_refused": 5,
    "p99_s": 1.9,
    "full_queue_s": 1.0,
    "memory_growth": 0.009,
    "kv_cache_usage": 0.0,
    "compile_total": 0.0,
}


def test_nothing_is_wrong_with_what_is_fine():
    assert judge(FINE) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_lost": 1},
        {"exit_code": 1},
        {"num_refused": 0},
        {"p99_s": 2.1},
        {"p99_s": None},
        {"memory_growth": 0.01},
        {"kv_cache_usage": 0.1},
        {"compile_total": 1.0},
    ],
)
def test_each_fault_is_found(wrong):
    assert len(judge({**FINE, **wrong})) == 1


def test_the_slowest_window_is_one_between_the_ends():
    ended_s = [*range(10, 20), 20, 21, *range(30, 40), 41]
    assert _slowest(ended_s, 50.0) == 0.2


def test_growth_is_from_when_memory_has_settled():
    memory = [(float(at_s), 1000 + max(0, 120 - at_s) + (50 if at_s >= 590 else 0)) for at_s in range(600)]
    assert _memory_figures([(at_s, 2**20 * nbytes) for at_s, nbytes in memory], 600.0)["memory_growth"] == 0.05
