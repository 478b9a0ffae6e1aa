"""Compiles every model of the tests' zoo and writes what was derived, or why it was refused, into docs/derivation.md.

    python -m benchmarks.derivation_table            # all models, and the table is replaced
    python -m benchmarks.derivation_table mha mla    # these alone, and no file is touched

Prints one line of JSON a model. Seconds are of one run on the machine named in the caption, with everything imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

import fastgpt_jax
from passes.incremental.errors import NotServable
from tests.compiler import zoo

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "derivation.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclasses.dataclass(frozen=True)
class Served:
    """A served model: operations of its graph, what is kept and what it costs."""

    model: str
    ops: int
    caches: str
    bytes_a_token: int
    bytes_a_request: int
    trace_s: float
    derive_s: float
    certify_s: float
    decode_ratio: float
    expansion_flops: int
    worst_error: float


@dataclasses.dataclass(frozen=True)
class Refused:
    """A refused model with the message its author reads, paths relative to the checkout."""

    model: str
    message: str


def measure(model: zoo.ZooModel) -> Served | Refused:
    """Compiles one model at its capacity."""
    with zoo.jax_defaults():
        fn, params = model.make()
        try:
            compiled = fastgpt_jax.compile(fn, params, fastgpt_jax.CompileConfig(max_model_len=model.capacity))
        except NotServable as error:
            return Refused(model.name, str(error).replace(f"{ROOT}{os.sep}", ""))
    kinds = Counter((e.kind, e.layers) for e in compiled.layout.entries)
    return Served(
        model.name,
        compiled.captured.graph.count(),
        ", ".join(f"{n} {kind}" + (f" x {layers} layers" if layers > 1 else "") for (kind, layers), n in kinds.items()),
        compiled.layout.bytes_per_token,
        compiled.layout.bytes_per_request,
        *(compiled.seconds[phase] for phase in ("trace", "derive", "certify")),
        compiled.certificate.decode_ratio,
        compiled.certificate.expansion_flops,
        compiled.certificate.worst_error,
    )


def table(rows: Sequence[Served | Refused]) -> Iterable[str]:
    """The lines between the markers."""
    served = [row for row in rows if isinstance(row, Served)]
    refused = [row for row in rows if isinstance(row, Refused)]
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    machine = f"{jax.devices()[0].device_kind} with {len(os.sched_getaffinity(0))} cores"
    yield f"{len(served)} served, {len(refused)} refused; {versions}, {machine}."
    yield ""
    yield "| model | ops | kept | B a token | B a request | trace + derive + certify, s | decode FLOPs | worst error |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in served:
        seconds = f"{row.trace_s:.2f} + {row.derive_s:.2f} + {row.certify_s:.2f}"
        ratio = f"{row.decode_ratio:.2f}" + (f" + {row.expansion_flops:,} expanding" if row.expansion_flops else "")
        yield (
            f"| {row.model} | {row.ops} | {row.caches} | {row.bytes_a_token} | {row.bytes_a_request} | {seconds} | "
            f"{ratio} | {row.worst_error:.1e} |"
        )
    yield ""
    yield "| refused | the message |"
    yield "|---|---|"
    for row in refused:
        yield f"| {row.model} | {row.message.replace('|', chr(92) + '|')} |"


def replace_table(page: str, lines: Iterable[str]) -> str:
    """The page with what stands between the markers replaced."""
    head, _, rest = page.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN} and {END}")
    return "\n".join([f"{head}{BEGIN}", "", *lines, "", f"{END}{tail}"])


def commit() -> str:
    """The commit measured."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def main(names: Sequence[str]) -> None:
    """Measures the models named, or all and writes the page."""
    models = [m for m in (*zoo.SERVED, *zoo.OPTIONAL, *zoo.REFUSED) if not names or m.name in names]
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit()}
    rows = []
    for model in models:
        rows.append(measure(model))
        sys.stdout.write(json.dumps({**dataclasses.asdict(rows[-1]), **about}) + "\n")
        sys.stdout.flush()
    if not names:
        PAGE.write_text(replace_table(PAGE.read_text(), table(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
