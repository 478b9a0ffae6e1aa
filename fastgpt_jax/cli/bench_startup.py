"""`fastgpt bench startup`: from process start to first token, in fresh processes.

fastgpt bench startup --model ARTIFACT --runs 5
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from fastgpt_jax.artifact.loading import is_artifact
from fastgpt_jax.artifact.verify import LEVELS
from fastgpt_jax.cli.bench_rows import append_jsonl, format_spread
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.errors import UserError


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text = flags.DEFINE_string
    text("model", None, "Artifact (fastgpt compile makes one).", required=True, flag_values=values)
    flags.DEFINE_integer("runs", 5, "Processes.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("verify", "fast", LEVELS, "What is checked first.", flag_values=values)
    flags.DEFINE_bool("fingerprint", False, "Check the numbers of a fixed prompt too.", flag_values=values)
    text("jsonl", None, "File that a line of JSON a process is added to.", flag_values=values)
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    runs: int
    verify: str
    fingerprint: bool
    jsonl: str | None


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "bench startup",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Starts processes one after the other and prints the medians of their phases."""
    if not is_artifact(options.model):
        raise UserError(f"--model must be an artifact, and {options.model} is none; fastgpt compile makes one")
    rows = [_run(options) for _ in range(options.runs)]
    print(format_spread(rows, list(rows[0]), what="seconds", digits=3))
    append_jsonl(options.jsonl, rows)
    return 0


def _run(options: Options) -> dict[str, float]:
    """One process; seconds of each phase, and of all."""
    words = [options.model, options.verify, "yes" if options.fingerprint else "no"]
    start = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-m", "fastgpt_jax.bench.startup", *words], capture_output=True, text=True, check=False
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"the process that was to serve {options.model} failed: {last}")
    stamps: dict[str, float] = json.loads(found.stdout.splitlines()[-1])["stamps"]
    seconds, last_s = {}, start
    for phase, at_s in stamps.items():
        seconds[phase], last_s = at_s - last_s, at_s
    return {**seconds, "all": last_s - start}
