"""How much memory `configs/edge_8gb.py` takes to serve, and how fast it is: compiled with random weights, then served.

    python -m benchmarks.cpu_peers_edge --artifact FOLDER                 # 8 billion parameters: 5 GB on disk
    python -m benchmarks.cpu_peers_edge --artifact FOLDER --write_page

Prints a line of JSON. The most memory that was resident in a fresh process counts, mapped files included, after a
prompt of 512 tokens and 32 steps; the machine that compiles needs more than the one that serves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.peers.bandwidth import Bandwidth
from benchmarks.peers.protocol import ROOT, EngineFailed, Worker
from benchmarks.peers.report import PAGE, write_page
from benchmarks.startup import commit
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.config_file import load_config
from fastgpt_jax.cli.tables import format_bytes
from fastgpt_jax.errors import UserError

CONFIG = ROOT / "configs" / "edge_8gb.py"
BEGIN, END = "<!-- edge: begin -->", "<!-- edge: end -->"
LIMIT_BYTES = 8e9
PROMPT, STEPS, TIMEOUT_S = 512, 32, 1800.0


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    artifact: str
    model: str
    write_page: bool


def make_flags() -> flags.FlagValues:
    """Returns the flags, not parsed."""
    values = flags.FlagValues()
    text = flags.DEFINE_string
    text("artifact", None, "Where the artifact is, or is made.", required=True, flag_values=values)
    text("model", f"{CONFIG}:make_model", "What is compiled, with the config's flags.", flag_values=values)
    flags.DEFINE_bool("write_page", False, "Replace the figures in docs/cpu.md.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    return run("cpu_peers_edge", make_flags(), lambda values: execute(to_options(values, Options)), argv)


def execute(options: Options) -> None:
    """Compiles what is missing, serves it, and tells."""
    artifact = Path(options.artifact).absolute()
    if not artifact.is_dir():
        command = [sys.executable, str(ROOT / "tools/compile.py"), *compile_flags(options.model, artifact)]
        start = time.monotonic()
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
            raise UserError(f"{options.model} was not compiled")
        print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)
    try:
        row = measure(artifact)
    except EngineFailed as error:
        raise UserError(str(error)) from None
    print(json.dumps(row), flush=True)
    if options.write_page:
        write_page(list(tell(row)), PAGE, BEGIN, END)


def compile_flags(model: str, artifact: Path) -> list[str]:
    """What `fastgpt compile` is called with."""
    chosen = load_config(CONFIG)["compile"]
    named = [f"--{name}={value}" for name, value in chosen.items()]
    return ["--model", model, "--output", str(artifact), "--verify=none", *named]


def measure(artifact: Path) -> dict[str, Any]:
    """Serves an artifact in a fresh process."""
    threads = len(os.sched_getaffinity(0))
    bandwidth = Bandwidth(threads)
    with Worker(
        Path(sys.executable), "fastgpt", {"model": str(artifact)}, threads=threads, timeout_s=TIMEOUT_S
    ) as worker:
        about = worker.wait_until_ready()
        first = worker.ask("first_token", tokens=PROMPT, seed=1)["seconds"]
        prefill = worker.ask("prefill", tokens=PROMPT, seed=2)["seconds"]
        read = bandwidth.measure()
        decode = worker.ask("decode", batch=1, prompt=PROMPT, steps=STEPS, seed=3)["seconds"]
        memory = worker.ask("memory")
    weights = sum(path.stat().st_size for path in (artifact / "weights").iterdir())
    return {
        "commit": commit(),
        "version": about["version"],
        "build": about["build"],
        "weight_bytes": weights,
        "first_token_s": first,
        "prefill_tokens_a_second": PROMPT / prefill,
        "decode_tokens_a_second": 1 / decode,
        "bandwidth": read,
        **memory,
    }


def tell(row: Mapping[str, Any]) -> Iterator[str]:
    """The lines of docs/cpu.md."""
    peak = row["VmHWM"]
    fits = "fits" if peak <= LIMIT_BYTES else "does not fit"
    yield (
        f"Weights of {format_bytes(row['weight_bytes'])}. Most resident memory {format_bytes(peak)}, of it "
        f"{format_bytes(row['RssAnon'])} private at the end: it {fits} 8 GB. First token of a prompt of {PROMPT} "
        f"after {row['first_token_s']:.1f} s, prefill of {row['prefill_tokens_a_second']:.1f} and decode of "
        f"{row['decode_tokens_a_second']:.2f} tokens a second beside {row['bandwidth'] / 1e9:.1f} GB/s of read "
        f"bandwidth; commit {row['commit']}."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
