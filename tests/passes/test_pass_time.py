"""What passes cost on large shapes, in CPU time, so that a busy machine does not decide.

In a process of its own, where nothing checks the types of every call.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def measured(name: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.pass_time", name]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def attentions(row: dict) -> int:
    return next(made for name, made, _ in row["passes"] if name == "attention")


def test_gpt2_124m_takes_seconds():
    row = measured("gpt2-124m")
    assert row["length"] == 1024 and attentions(row) == 12
    assert row["passes_cpu_s"] < 3
    assert row["validation_cpu_s"] < 20


def test_a_llama_of_80_layers_takes_less_than_half_a_minute():
    row = measured("llama70b-80")
    assert attentions(row) == 80
    assert row["passes_cpu_s"] + row["validation_cpu_s"] < 30
