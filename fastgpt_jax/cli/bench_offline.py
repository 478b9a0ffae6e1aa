"""`fastgpt bench offline`: throughput of an engine in this process, all requests at once.

fastgpt bench offline --model ARTIFACT --num_requests 64 --prompt_len 16-64 --output_len 16-64
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence

from absl import flags

from fastgpt_jax.artifact.loading import is_artifact
from fastgpt_jax.bench.workload import Asked
from fastgpt_jax.cli.bench_rows import append_jsonl, format_spread
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.workload_flags import WorkloadOptions, add_workload_flags, make_requests
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("model", None, "Artifact (fastgpt compile makes one).", required=True, flag_values=values)
    integer("runs", 3, "Runs; the table gives the median.", lower_bound=1, flag_values=values)
    text("jsonl", None, "File that a line of JSON a run is added to.", flag_values=values)
    add_workload_flags(values)
    return values


@dataclasses.dataclass(frozen=True)
class Options(WorkloadOptions):
    """The flags, parsed."""

    model: str
    runs: int
    jsonl: str | None


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "bench offline",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Runs the workload and prints what it took."""
    if options.cancel_share:
        raise UserError("--cancel_share is for a server's clients; leave it out")
    if not is_artifact(options.model):
        raise UserError(f"--model must be an artifact, and {options.model} is none; fastgpt compile makes one")
    llm = LLM(options.model)
    rows = []
    for index in range(options.runs + 1):  # the first makes the programs callable, and is not counted
        row = {"run": index, **_run(llm, make_requests(options, None, index))}
        print(f"{'warm-up' if not index else f'run {index}'}: {row['output_tokens_per_s']:.1f} tok/s", file=sys.stderr)
        rows.append(row)
    rows = rows[1:]
    names = ("seconds", "requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "step_ms", "idle_ms_per_step")
    print(format_spread(rows, names))
    append_jsonl(options.jsonl, rows)
    return 0


def _run(llm: LLM, requests: Sequence[Asked]) -> dict[str, float]:
    params = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
    prompts = [list(r.prompt_ids) for r in requests]
    before = llm.llm_engine.stats()
    start = time.perf_counter()
    outputs = llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)
    seconds = time.perf_counter() - start
    after = llm.llm_engine.stats()
    num_steps = after.num_steps - before.num_steps
    idle_s, busy_s = after.idle_gap_s - before.idle_gap_s, after.device_time_s - before.device_time_s
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "seconds": seconds,
        "requests_per_s": len(outputs) / seconds,
        "prompt_tokens_per_s": sum(map(len, prompts)) / seconds,
        "output_tokens_per_s": num_output / seconds,
        "step_ms": 1e3 * busy_s / num_steps,
        "idle_ms_per_step": 1e3 * idle_s / num_steps,
    }
