"""From process start to first token: an artifact beside compiling the same entry points, and beside `import jax` alone.

    python -m benchmarks.startup                       # the embedded demo, and stories260K where it is found
    python -m benchmarks.startup --llama_1b            # and a random-weight Llama of 1.1B parameters, 22 layers
    python -m benchmarks.startup --models demo --runs 3 --jsonl startup.jsonl

Every figure is the median over fresh processes; the kinds of process take turns, so that a busy machine slows all of
them. The goal: with `--verify=fast` and no fingerprint, at most `import jax`, 0.3 s, and paging the weights in.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.tables import format_bytes, format_seconds, format_table
from fastgpt_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CHILD = ROOT / "benchmarks/startup_child.py"
STORIES = ROOT.parent / "shared/data/models/stories260K"
DEMO = ROOT / "fastgpt_jax/assets/demo"
OVERHEAD_GOAL_S = 0.3
SMALL_PLAN = ("--max_model_len=512", "--max_num_seqs=1", "--buckets=16")
"""For the large shape: five entry points, so that compiling them anew for every run ends within minutes."""

MAKE_LLAMA = """
from flax import nnx
from fastgpt_jax.checkpoint import export_model
from fastgpt_jax.models.llama import Llama, LlamaConfig
import sys
config = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=1e4,
    dtype="float32",
)
export_model(Llama(config, rngs=nnx.Rngs(0)), config, sys.argv[1], dtype="float32")
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its artifact."""

    name: str
    model: Path
    artifact: Path


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    models: tuple[str, ...]
    llama_1b: bool
    runs: int
    scratch: bool
    cold: bool
    jsonl: str | None


def make_flags() -> flags.FlagValues:
    """Returns the flags, not parsed."""
    values = flags.FlagValues()
    known = ["demo", "stories260K"]
    flags.DEFINE_list("models", known, f"Of {', '.join(known)}; what is not found is left out.", flag_values=values)
    flags.DEFINE_bool("llama_1b", False, "Also a random-weight Llama of 1.1B parameters.", flag_values=values)
    flags.DEFINE_integer("runs", 5, "Processes of each kind.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("scratch", True, "Also compile the same entry points in the process.", flag_values=values)
    flags.DEFINE_bool("cold", False, "Drop the artifact from the page cache before each process.", flag_values=values)
    flags.DEFINE_string("jsonl", None, "File that a line of JSON a process is added to.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    return run("startup", make_flags(), lambda values: execute(to_options(values, Options)), argv)


def execute(options: Options) -> None:
    """Measures every model and prints its table."""
    about = {"benchmark": "startup", "cores": os.cpu_count(), "machine": platform.machine(), "commit": commit()}
    about["cold"] = options.cold
    with tempfile.TemporaryDirectory() as folder:
        for case in make_cases(options, Path(folder)):
            rows = list(measure(case, options))
            for row in rows:
                _write(options.jsonl, {**about, "model": case.name, **row})
            print("\n".join(report(case, rows)), flush=True)


def make_cases(options: Options, folder: Path) -> Iterator[Case]:
    """Compiles the models asked for, each when its turn comes."""
    wanted = {"demo": DEMO, "stories260K": STORIES}
    for name in options.models:
        if name not in wanted:
            raise UserError(f"--models must be of {', '.join(wanted)}, got {name!r}")
        if wanted[name].is_dir():
            yield compile_case(name, wanted[name], folder)
    if options.llama_1b:
        _say("writing a random-weight Llama of 1.1B parameters")
        subprocess.run([sys.executable, "-c", MAKE_LLAMA, str(folder / "llama_1b")], cwd=ROOT, check=True)
        yield compile_case("llama-1.1b", folder / "llama_1b", folder, SMALL_PLAN)


def compile_case(name: str, model: Path, folder: Path, plan: Sequence[str] = ()) -> Case:
    """Writes a model's artifact as a user would."""
    artifact = folder / f"{name}-artifact"
    command = [sys.executable, str(ROOT / "tools/compile.py"), "--model", str(model), "--output", str(artifact), *plan]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise UserError(f"{name} was not compiled, which ended with exit code {done.returncode}")
    return Case(name, model, artifact)


def measure(case: Case, options: Options) -> Iterator[dict[str, Any]]:
    """A row a process: the kinds take turns."""
    artifact = {"artifact": str(case.artifact)}
    kinds: dict[str, tuple[str, Mapping[str, Any]]] = {
        "import jax": ("jax", {}),
        "page in": ("page_in", artifact),
        "sha256": ("sha256", {}),
        "artifact, fast": ("artifact", {**artifact, "verify": "fast", "fingerprint": False}),
        "artifact, full": ("artifact", {**artifact, "verify": "full", "fingerprint": True}),
    }
    if options.scratch:
        kinds["from scratch"] = ("scratch", {**artifact, "model": str(case.model)})
    for index in range(options.runs):
        for kind, (mode, settings) in kinds.items():
            _say(f"{case.name}: {kind}, {index + 1} of {options.runs}")
            if options.cold:
                drop_cache(case.artifact)
            yield {"kind": kind, "run": index, **run_child(mode, settings)}


def run_child(mode: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one process; what it printed."""
    command = [sys.executable, str(CHILD), mode, str(time.monotonic()), json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT)
    if done.returncode != 0:
        raise UserError(f"the process that measures {mode!r} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def drop_cache(folder: Path) -> None:
    """Asks the kernel to forget the files' pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(case: Case, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of one model, and whether the goal is met."""
    columns = ("interpreter", "import_jax", "imports", "verify", "weights", "executables", "derive", "first_step")
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        if kind not in ("page in", "sha256"):
            phases = [split(row) for row in own]
            cells = [median(phase.get(name) for phase in phases) for name in (*columns, "rest")]
            totals = [row["total_s"] for row in own]
            spread = f"{min(totals):.2f} to {max(totals):.2f}"
            lines.append(
                (kind, *(f"{cell:.3f}" if cell is not None else "-" for cell in cells), f"{median(totals):.2f}", spread)
            )
    versions = next(row["versions"] for row in rows if "versions" in row)
    yield f"\n{case.name}: seconds from process start to first token, median of {1 + max(row['run'] for row in rows)}"
    yield f"jax {versions['jax']}, Python {versions['python']}, {os.cpu_count()} cores, commit {commit()}"
    yield format_table(lines, ("process", *columns, "rest", "total", "range"))
    yield from judge(rows)


def split(row: Mapping[str, Any]) -> dict[str, float]:
    """The phases of a process, with what happens inside others taken out of them."""
    seconds, parts = dict(row["seconds"]), row.get("parts", {})
    if parts:
        # Executables are made callable when they are first asked for: in the first step, or for the fingerprint.
        outer = "load" if "fingerprint" in parts else "first_step"
        inner = {name: parts[name] for name in ("verify", "weights") if name in parts}
        seconds["rest"] = seconds.pop("load") - sum(inner.values())
        seconds["rest" if outer == "load" else outer] -= parts["executables"]
        seconds |= {**inner, "executables": parts["executables"]}
    return seconds


def judge(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The goal, and the floors of what depends on the size of the weights."""

    def of(kind: str, value: Any) -> float:
        return statistics.median(value(row) for row in rows if row["kind"] == kind)

    bare = of("import jax", lambda row: row["total_s"])
    page_in = of("page in", lambda row: row["seconds"]["page_in"])
    num_bytes = of("page in", lambda row: row["num_bytes"])
    rate = of("sha256", lambda row: row["num_bytes"] / row["seconds"]["sha256"])
    found = of("artifact, fast", lambda row: row["total_s"])
    goal = bare + OVERHEAD_GOAL_S + page_in
    yield (
        f"goal: import jax {bare:.2f} s + {OVERHEAD_GOAL_S} s + page-in {page_in:.2f} s = {goal:.2f} s; "
        f"found {found:.2f} s: {'met' if found <= goal else 'missed'}"
    )
    yield (
        f"weights: {format_bytes(num_bytes)}, paged in at {format_bytes(num_bytes / page_in)}/s; SHA-256 runs at "
        f"{format_bytes(rate)}/s, so reading all of them takes {format_seconds(num_bytes / rate)} at least"
    )


def median(values: Any) -> float | None:
    """The median of what is there."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def commit() -> str:
    """The commit measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def _write(path: str | None, row: Mapping[str, Any]) -> None:
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
