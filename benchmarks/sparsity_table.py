"""Compiles stories260K with attention made sparse in several ways and writes what that saves and costs into
docs/sparse_attention.md.

    python -m benchmarks.sparsity_table                              # all, and the table is replaced
    python -m benchmarks.sparsity_table "all: window(64)|sinks(4)"   # this alone, and no file is touched

Prints one line of JSON a setting. Work and bytes are those of the compiled decode step; distances are of the served
step over whole texts from the dense model's, on stories that the dense model writes. Needs the shared data beside the
checkout.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.quantization_table import BEGIN, END, MODEL, NUM_ROWS, NUM_TEXTS, NUM_TOKENS, ROOT, served, texts
from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.compiled_cost import CompiledCost, compiled_cost
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.entry_point import compile_entry_point
from fastgpt_jax.compiler.quality import Quality, compare
from passes.manager import PassOptions
from passes.masks import causal
from passes.sparse_attention.density import Density, find_density
from passes.sparse_attention.parser import parse_sparsity

PAGE = ROOT / "docs" / "sparse_attention.md"
LENGTH = 512
DECODE = EntryPointKey(NUM_ROWS, NUM_ROWS, "greedy", False)
NUM_LAYERS, NUM_HEADS = 5, 8
PIPELINE = "simplify,attention,simplify"
"""Attention as plain XLA: of kernels that end their loops where a request does no count is known in advance."""

SETTINGS = (
    None,
    "all: density(0.5)",
    "all: density(0.3)",
    "all: density(0.1)",
    "all: window(128) | sinks(4)",
    "all: window(64) | sinks(4)",
    "all: window(32) | sinks(4)",
    "layers[0:half]: window(32) | sinks(4)",
    "heads[0:half]: window(32) | sinks(4)",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting: what is left of causal attention, the work of a decode step of all rows, and distances."""

    sparse: str | None
    density: Density
    flops: int
    dot_flops: int
    bytes_read: int
    quality: Quality


def compiled_as(sparse: str | None, model: Any) -> Compiled:
    """The model under a setting; its rewrites are validated by the test suite."""
    config = CompileConfig(
        max_model_len=LENGTH,
        max_num_seqs=NUM_ROWS,
        sparse=sparse,
        pipeline=PIPELINE,
        pass_options=PassOptions(is_validating=False),
    )
    return compile_model(model, config=config)


def mean_density(sparse: str | None) -> Density:
    """Over all heads of all layers."""
    choice = parse_sparsity(sparse or "all: full").choose([NUM_HEADS] * NUM_LAYERS)
    found = [
        find_density(rule.mask(LENGTH) & causal(), causal(), LENGTH)
        for layer in range(NUM_LAYERS)
        for rule in choice.rules(layer)
    ]
    return Density(float(np.mean([x.elements for x in found])), float(np.mean([x.blocks for x in found])))


def decode_cost(compiled: Compiled) -> CompiledCost:
    return compiled_cost(compile_entry_point(compiled.trace(DECODE)).compiled)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines between the markers."""
    yield (
        f"stories260K ({NUM_LAYERS} layers of {NUM_HEADS} heads) at `max_model_len` {LENGTH}. Pairs and blocks of 128 "
        "by 128 are those that are left of causal attention, over all heads. FLOPs and bytes read are counted in the "
        f"compiled decode step of {NUM_ROWS} requests, loops multiplied out, all of the model included, attention as "
        f"plain XLA: what a step costs at a context of {LENGTH} tokens. Distances are from the dense model on "
        f"{NUM_TEXTS} stories of {NUM_TOKENS} tokens that it writes at temperature 1, seeds 0 to 63. jax "
        f"{jax.__version__} on CPU, one run, deterministic."
    )
    yield ""
    yield "| `--sparse` | pairs | blocks | FLOPs | of products | bytes read | mean KLD | 99.9% KLD | same top-1 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        name = "none" if row.sparse is None else "`" + row.sparse.replace("|", "\\|") + "`"
        yield (
            f"| {name} | {row.density.elements:.1%} | {row.density.blocks:.1%} | {row.flops:,} | {row.dot_flops:,} | "
            f"{row.bytes_read:,} | {row.quality.mean_kld:.6f} | {row.quality.kld_999:.4f} | "
            f"{row.quality.same_top1:.2%} |"
        )


def main(wanted: Sequence[str]) -> None:
    model = load_model(MODEL)
    exact = compiled_as(None, model)
    stories, reference = texts(model, exact)["stories"], served(exact)
    rows = []
    for sparse in wanted or SETTINGS:
        start = time.perf_counter()
        compiled = exact if sparse is None else compiled_as(sparse, model)
        cost = decode_cost(compiled)
        (quality,) = compare(reference, [served(compiled)], stories, NUM_ROWS)
        rows.append(Row(sparse, mean_density(sparse), cost.flops, cost.dot_flops, cost.bytes_read, quality))
        print(json.dumps(dataclasses.asdict(rows[-1])), flush=True)
        print(f"{sparse}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not wanted:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(
            f"{before}{BEGIN}\n{chr(10).join(table(rows))}\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
