"""Runs the passes over many models and writes what each did, and how exactly, into docs/passes.md.

    python -m benchmarks.pass_table                 # those of the table, which is replaced
    python -m benchmarks.pass_table llama zoo:mha   # these alone, and no file is touched

Models are tiny ones of every family and those of the tests' zoo, as their training forwards. The error of a model is
the largest of its outputs after all passes against the traced forward, both in float64. Prints one line of JSON a
model.
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
from passes.drop_placement import drop_placement
from passes.expand import expand
from passes.extract import clone
from passes.graph import Graph
from passes.manager import PassManager, PassOptions
from passes.reader import trace
from passes.registry import parse_pipeline
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
class Row:
    """One model: operations as traced; for each pass rewrites made, sites missed and operations left; seconds of all.

    Attributes:
      invalid: Rewrites that are not known to be valid.
      error: Relative, in float64, after all passes.
    """

    model: str
    ops: int
    passes: tuple[tuple[str, int, int, int], ...]
    seconds: float
    invalid: int
    error: float


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
    original, ops = clone(graph), graph.count()
    statistics = PassManager(parse_pipeline(pipeline), PassOptions(on_invalid="skip")).run(graph)
    return Row(
        name,
        ops,
        tuple((s.name, s.result.matched, s.result.missed, s.ops_after) for s in statistics),
        sum(s.seconds for s in statistics),
        sum(v.status != "valid" for s in statistics for v in s.validations),
        error_between(original, graph, arguments),
    )


def error_between(before: Graph, after: Graph, arguments: Sequence[Any]) -> float:
    """The largest relative error of the outputs of one graph against those of another, in float64."""
    results = []
    for graph in (before, after):
        plain = clone(graph)
        drop_placement(plain)
        results.append(Reference(expand(plain))(arguments))
    return max(relative_error(want, have)[0] for want, have in zip(*results, strict=True))


def table(rows: Sequence[Row]) -> Iterable[str]:
    """The lines of the page."""
    first = rows[0]
    names = [name for name, *_ in first.passes]
    yield (
        f"{len(rows)} models, tiny ones of every family and those of the tests' zoo, as their training forwards; jax "
        f"{jax.__version__}, Python {platform.python_version()}. A cell is `rewrites made: operations left`, and `+n` "
        "for sites that came close and were left, each with a remark. The error is that of all outputs after all "
        "passes, relative, in float64; constants that `simplify` folds are float32."
    )
    yield ""
    yield f"| model | traced | {' | '.join(f'`{name}`' for name in names)} | seconds | not valid | error |"
    yield "|---" * (len(names) + 5) + "|"
    for row in rows:
        cells = [f"{made}{f' +{missed}' if missed else ''}: {left}" for _, made, missed, left in row.passes]
        yield (
            f"| {row.model} | {row.ops} | {' | '.join(cells)} | {row.seconds:.2f} | {row.invalid} | {row.error:.1e} |"
        )


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
