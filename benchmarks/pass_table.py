"""Runs the passes over many models and writes what each did, and how exactly, into docs/passes.md.

    python -m benchmarks.pass_table                 # those of the table, which is replaced
    python -m benchmarks.pass_table llama zoo:mha   # these alone, and no file is touched

Models are tiny ones of every family and those of the tests' zoo, as their training forwards. After each pass the
outputs are held against those of the traced forward, both in float64; after each exact pass also against those before
it, operation by operation in the dtypes as they are, where no bit may differ; and each pass is run once more on what it
left, where it may do nothing. Prints one line of JSON a model, with seconds; benchmarks.pass_time is for those of large
shapes.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.derivation_table import commit, replace_table
from passes.cse import graph_key
from passes.drop_placement import drop_placement
from passes.expand import expand
from passes.extract import clone
from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.numerics import Numerics
from passes.reader import trace
from passes.registry import Pass, parse_pipeline
from passes.replay import evaluate
from passes.transform import name_parameters
from passes.validation import Reference, relative_error
from tests.compiler import zoo
from tests.models.families import FAMILIES, make_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "passes.md", ROOT / "docs" / "pass_table.md")
PLACE = "<!-- table -->"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PIPELINE = "fuse"
LENGTH = 12
ZOO = (
    "mha fused_qkv gqa_grouped mqa mla_rope alibi soft_cap qk_norm sink_in_denominator differential "
    "probabilities_reused jax_nn_window sliding_window rope_half rope_interleaved rope_partial rg_lru mamba rwkv "
    "linear_attention scan_layers linen nnx dense_experts bfloat16 tied_embeddings"
).split()
"""Of the zoo the models that have something for these passes, or nearly."""


@dataclasses.dataclass(frozen=True)
class PassRow:
    """One pass over one model.

    Attributes:
      made, missed: Rewrites, and sites that came close and were left.
      left: Operations after it.
      error: Of all outputs against the traced forward, relative, in float64.
      bits: Numbers that an exact pass changed, operation by operation; None for another pass.
      again: Rewrites that a second run makes at once, or 1 where it changes the program without telling.
    """

    name: str
    made: int
    missed: int
    left: int
    error: float
    bits: int | None
    again: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
      ops: Operations as traced.
      seconds: Of all passes.
      invalid: Rewrites that are not known to be valid.
    """

    model: str
    ops: int
    passes: tuple[PassRow, ...]
    seconds: float
    invalid: int

    @property
    def error(self) -> float:
        """After all passes."""
        return self.passes[-1].error

    @property
    def bits(self) -> int:
        """Numbers that exact passes changed."""
        return sum(p.bits for p in self.passes if p.bits is not None)


def family_graph(name: str) -> tuple[Graph, list[Any]]:
    """The forward of a family's tiny model and its arguments."""
    graphdef, state = nnx.split(make_model(name))
    return _traced(lambda state, tokens: nnx.merge(graphdef, state)(tokens), state, _tokens(1, LENGTH, 23))


def zoo_graph(model: zoo.ZooModel) -> tuple[Graph, list[Any]]:
    """The forward of a zoo model and its arguments."""
    with zoo.jax_defaults():
        fn, params = model.make()
        return _traced(zoo.full_forward(model, fn), params, jnp.asarray(zoo.tokens_of(model)))


def _tokens(rows: int, length: int, vocabulary: int) -> Any:
    return jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (rows, length)), jnp.int32)


def _traced(fn: Callable[..., Any], *args: Any) -> tuple[Graph, list[Any]]:
    graph, _ = trace(fn, *args)
    name_parameters(graph, args, [0])
    return graph, jax.tree.leaves(args)


def measure(name: str, graph: Graph, arguments: Sequence[Any], pipeline: str = PIPELINE) -> Row:
    """Runs the passes over one graph, in place."""
    ops, seconds, invalid, rows = graph.count(), 0.0, 0, list[PassRow]()
    wanted = in_float64(graph, arguments)
    for entry in parse_pipeline(pipeline):
        before = clone(graph)
        (run,) = PassManager([entry], PassOptions(on_invalid="skip")).run(graph)
        is_changed = graph_key(graph) != graph_key(before)
        rows.append(
            PassRow(
                entry.name,
                run.result.matched,
                run.result.missed,
                run.ops_after,
                largest_error(wanted, in_float64(graph, arguments)) if is_changed or not rows else rows[-1].error,
                _changed_numbers(before, graph, arguments) if entry.numerics is Numerics.EXACT else None,
                _run_again(entry, graph),
            )
        )
        seconds += run.seconds
        invalid += sum(v.status != "valid" for v in run.validations)
    return Row(name, ops, tuple(rows), seconds, invalid)


def _run_again(entry: Pass, graph: Graph) -> int:
    copy = clone(graph)
    (run,) = PassManager([entry], PassOptions(is_validating=False)).run(copy)
    return run.result.matched or int(graph_key(copy) != graph_key(graph))


def _changed_numbers(before: Graph, after: Graph, arguments: Sequence[Any]) -> int:
    """How many numbers of the outputs have other bits, each operation run by itself; NaNs are alike."""
    if graph_key(before) == graph_key(after):
        return 0
    results = [[np.asarray(x) for x in evaluate(_placed_anywhere(g), arguments)] for g in (before, after)]
    return sum(int(np.sum((_bits(a) != _bits(b)) & ~((a != a) & (b != b)))) for a, b in zip(*results, strict=True))


def _bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == bool else np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(x.shape)


def _placed_anywhere(graph: Graph) -> Graph:
    copy = clone(graph)
    drop_placement(copy)
    return copy


def in_float64(graph: Graph, arguments: Sequence[Any]) -> list[np.ndarray]:
    """The outputs of a graph with every float widened."""
    return Reference(expand(_placed_anywhere(graph)))(arguments)


def largest_error(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Of all outputs, relative."""
    return max(relative_error(want, have)[0] for want, have in zip(wanted, found, strict=True))


def error_between(before: Graph, after: Graph, arguments: Sequence[Any]) -> float:
    """The largest relative error of the outputs of one graph against those of another, in float64."""
    return largest_error(in_float64(before, arguments), in_float64(after, arguments))


def table(rows: Sequence[Row]) -> Iterable[str]:
    """The lines of the page."""
    names = [p.name for p in rows[0].passes]
    yield (
        f"{len(rows)} models, tiny ones of every family and those of the tests' zoo, as their training forwards; jax "
        f"{jax.__version__}, Python {platform.python_version()}. A cell is `rewrites made: operations left`, `+n` for "
        "sites that came close and were left, each with a remark, and in brackets the error of all outputs against the "
        "traced forward, relative, in float64, where it is not 0; constants that `simplify` folds are float32. *Op by "
        "op*: numbers of the outputs whose bits exact passes changed, each operation run by itself in its own dtypes. "
        "*Again*: rewrites that second runs of the passes made, each at once after the first."
    )
    yield ""
    columns = " | ".join(f"`{name}`" for name in names)
    yield f"| model | traced | {columns} | not valid | error | op by op | again |"
    yield "|---" * (len(names) + 6) + "|"
    for row in rows:
        again = sum(p.again for p in row.passes)
        yield (
            f"| {row.model} | {row.ops} | {' | '.join(map(_cell, row.passes))} | {row.invalid} "
            f"| {row.error:.1e} | {row.bits} | {again} |"
        )


def _cell(p: PassRow) -> str:
    missed = f" +{p.missed}" if p.missed else ""
    return f"{p.made}{missed}: {p.left}" + (f" ({p.error:.0e})" if p.error else "")


def put(page: str, lines: Iterable[str]) -> str:
    """The page with the table in its place: between the markers, or where `<!-- table -->` stands."""
    if BEGIN not in page:
        page = page.replace(PLACE, f"{BEGIN}\n{END}", 1) if PLACE in page else f"{page}\n{BEGIN}\n{END}\n"
    return replace_table(page, lines)


def main(wanted: Sequence[str]) -> None:
    """Measures the models named, or those of the table and writes the page."""
    makers: dict[str, Callable[[], tuple[Graph, list[Any]]]] = {}
    for name in FAMILIES:
        makers[name] = lambda name=name: family_graph(name)
    for model in zoo.SERVED:
        makers[f"zoo:{model.name}"] = lambda model=model: zoo_graph(model)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit()}
    rows = []
    for name, make in makers.items():
        if name in wanted or not wanted and name.removeprefix("zoo:") in (*FAMILIES, *ZOO):
            with zoo.jax_defaults():
                rows.append(measure(name, *make()))
            sys.stdout.write(json.dumps({**dataclasses.asdict(rows[-1]), **about}) + "\n")
            sys.stdout.flush()
    if not wanted:
        page = next((path for path in PAGES if path.exists()), PAGES[-1])
        text = page.read_text() if page.exists() else "# What each pass did\n"
        page.write_text(put(text, table(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
