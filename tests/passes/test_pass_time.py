"""What passes cost on large shapes, in CPU time, so that a busy machine does not decide."""

import pytest

from benchmarks.pass_time import measure

pytestmark = pytest.mark.slow


def test_gpt2_124m_takes_seconds():
    row = measure("gpt2-124m")
    assert row["length"] == 1024 and {name: made for name, made, _ in row["passes"]}["attention"] == 12
    assert row["passes_cpu_s"] < 3
    assert row["validation_cpu_s"] < 20


def test_a_llama_of_80_layers_takes_less_than_half_a_minute():
    row = measure("llama70b-80")
    assert {name: made for name, made, _ in row["passes"]}["attention"] == 80
    assert row["passes_cpu_s"] + row["validation_cpu_s"] < 30
