"""The startup benchmark's arithmetic: phases add up to the total, and the goal is judged by the medians."""

from __future__ import annotations

import pytest

from benchmarks.startup import judge, split

FAST = {
    "kind": "artifact, fast",
    "run": 0,
    "seconds": {"interpreter": 0.1, "import_jax": 1.0, "imports": 0.2, "load": 0.5, "first_step": 0.4},
    "parts": {"verify": 0.1, "weights": 0.2, "executables": 0.3},
    "total_s": 2.2,
}


def others(page_in_s):
    return [
        {"kind": "import jax", "total_s": 1.0},
        {"kind": "page in", "num_bytes": 2**30, "seconds": {"page_in": page_in_s}},
        {"kind": "sha256", "num_bytes": 2**30, "seconds": {"sha256": 2.0}},
    ]


@pytest.mark.parametrize("parts", [{}, {"fingerprint": 0.3}])
def test_phases_add_up_to_the_total(parts):
    row = {**FAST, "parts": {**FAST["parts"], **parts}}
    phases = split(row)
    assert sum(phases.values()) == pytest.approx(row["total_s"])
    assert phases["executables"] == 0.3 and phases["verify"] == 0.1
    assert phases["first_step"] == pytest.approx(0.4 if parts else 0.1)


def test_the_goal_is_jax_and_a_constant_and_the_pages():
    slower = {**FAST, "total_s": 9.0}
    goal, weights = judge([*others(1.0), FAST, FAST, slower])
    assert goal.endswith("= 2.30 s; found 2.20 s: met")
    assert judge([*others(0.8), FAST]).__next__().endswith("= 2.10 s; found 2.20 s: missed")
    assert "paged in at 1 GiB/s" in weights and "takes 2 s at least" in weights
