"""The products of the native CPU kernels: bytes and operations a second, beside the run's read bandwidth.

    python -m benchmarks.cpu_kernels --quick
    python -m benchmarks.cpu_kernels --ops int8,int4 --tokens 1,8,512 --jsonl cpu_kernels.jsonl

Shapes are those of TinyLlama-1.1B. Calls take turns with a read of 256 MB by all threads, so that a busy machine slows
both; every figure is a median. Each call reads other weights, as the layers of a model do, so that none are in a cache.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.startup import commit
from fastgpt_jax.cli.bench_rows import append_jsonl
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.tables import format_table
from fastgpt_jax.errors import UserError
from fastgpt_jax.kernels.cpu import dot, library

SHAPES = ((2048, 2560), (2048, 2048), (2048, 11264), (5632, 2048), (2048, 32000))
"""Sizes in and out: queries, keys and values; what attention gives; gate and up; down; logits."""

BYTES = {"int8": 1.0, "int4": 0.5 + 2 / 32, "int8_floats": 1.0, "int4_floats": 0.5 + 2 / 32, "bf16": 2.0, "f32": 4.0}
"""Of a weight with its share of scales, for each product."""

READ_BYTES = 256 << 20
POOL_BYTES = 256 << 20
"""Weights that calls go through in turn: more than caches hold."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    ops: list[str]
    tokens: list[str]
    runs: int
    quick: bool
    xla: bool
    jsonl: str | None


def make_flags() -> flags.FlagValues:
    """Returns the flags, not parsed."""
    values = flags.FlagValues()
    flags.DEFINE_list("ops", list(BYTES), f"Products, of {', '.join(BYTES)}.", flag_values=values)
    flags.DEFINE_list("tokens", ["1", "2", "4", "8", "16", "32", "128", "512"], "Rows.", flag_values=values)
    flags.DEFINE_integer("runs", 15, "Calls of a shape.", lower_bound=3, flag_values=values)
    flags.DEFINE_bool("quick", False, "One shape, five calls, 1, 8 and 512 rows.", flag_values=values)
    flags.DEFINE_bool("xla", False, "Time XLA's own float32 product too.", flag_values=values)
    flags.DEFINE_string("jsonl", None, "File that a line of JSON a shape is added to.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit code."""
    return run("cpu_kernels", make_flags(), lambda values: execute(to_options(values, Options)), argv)


def execute(options: Options) -> None:
    """Measures every product and prints its table."""
    if reason := library.unusable_reason():
        raise UserError(f"the native kernels are measured, and {reason}")
    if unknown := [op for op in options.ops if op not in BYTES]:
        raise UserError(f"--ops must be of {', '.join(BYTES)}, got {unknown[0]!r}")
    if wrong := [text for text in options.tokens if not text.isdecimal() or text == "0"]:
        raise UserError(f"--tokens must be numbers above 0, got {wrong[0]!r}")
    about = {"benchmark": "cpu_kernels", "cores": os.cpu_count(), "machine": platform.machine()}
    about |= {"isa": library.isa(), "jax": jax.__version__, "commit": commit()}
    shapes = SHAPES[:1] if options.quick else SHAPES
    tokens = [1, 8, 512] if options.quick else [int(text) for text in options.tokens]
    for op in options.ops:
        rows = [measure(op, T, K, O, options) for K, O in shapes for T in tokens]  # noqa: E741
        append_jsonl(options.jsonl, [{**about, **row} for row in rows])
        print(f"{op}\n{format_table(list(_cells(rows)))}\n", flush=True)


def measure(op: str, T: int, K: int, O: int, options: Options) -> dict[str, Any]:  # noqa: E741
    """Medians of one product."""
    num_bytes = K * O * BYTES[op]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((T, K)), "bfloat16" if op == "bf16" else "float32")
    product = jax.jit(lambda x, w: _product(op, x, w))
    weights = [_weights(op, K, O, seed) for seed in range(max(2, min(32, math.ceil(POOL_BYTES / num_bytes))))]
    paths: dict[str, Callable[[int], Any]] = {"native": lambda i: product(x, weights[i % len(weights)])}
    if options.xla and op == "f32":
        by_xla = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
        paths["xla"] = lambda i: by_xla(x, weights[i % len(weights)][0])
    whole = jnp.ones(READ_BYTES // 4, jnp.uint32)
    total = jax.jit(lambda words: jax.ffi.ffi_call("fastgpt_read_sum", jax.ShapeDtypeStruct((), np.uint32))(words))
    paths["read"] = lambda i: total(whole)
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(5 if options.quick else options.runs):
        for name, call in paths.items():
            if i == 0:
                jax.block_until_ready(call(0))
            begin = time.perf_counter()
            jax.block_until_ready(call(i + 1))
            taken[name].append(time.perf_counter() - begin)
    median_s = {name: statistics.median(values) for name, values in taken.items()}
    row = {"op": op, "tokens": T, "depth": K, "rows": O, "native_s": median_s["native"], "best_s": min(taken["native"])}
    row |= {"bytes_per_s": num_bytes / median_s["native"], "read_bytes_per_s": READ_BYTES / median_s["read"]}
    row |= {"ops_per_s": 2 * T * K * O / median_s["native"]}
    return row | ({"xla_s": median_s["xla"]} if "xla" in median_s else {})


def _weights(op: str, K: int, O: int, seed: int) -> tuple[Any, ...]:  # noqa: E741
    random = np.random.default_rng(seed)
    if op.startswith("int8"):
        return jnp.asarray(random.integers(-127, 128, (O, K), np.int8)), jnp.full(O, 0.01, jnp.float32)
    if op.startswith("int4"):
        packed = random.integers(0, 256, (O, K // 2), np.uint8)
        return jnp.asarray(packed), jnp.full((O, K // 32), 0.01, jnp.bfloat16)
    numbers = random.random((O, K), np.float32) - 0.5
    return (jnp.asarray(numbers, "bfloat16" if op == "bf16" else "float32"),)


def _product(op: str, x: Any, weights: tuple[Any, ...]) -> Any:
    activation = None if op.endswith("_floats") else "int8"
    if op.startswith("int8"):
        return dot.int8_dot(x, *weights, activation=activation)
    if op.startswith("int4"):
        return dot.int4_dot(x, *weights, group_size=32, activation=activation)
    return dot.weight_dot(x, *weights)


def _cells(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    names = ("rows of x", "shape", "ms", "GB/s", "of the read bandwidth", "GOP/s")
    yield (*names, "XLA's ms") if "xla_s" in rows[0] else names
    for row in rows:
        cells = (f"{row['tokens']}", f"{row['depth']} -> {row['rows']}", f"{row['native_s'] * 1e3:.3f}")
        share = row["bytes_per_s"] / row["read_bytes_per_s"]
        cells += (f"{row['bytes_per_s'] / 1e9:.1f}", f"{share:.2f} of {row['read_bytes_per_s'] / 1e9:.1f}")
        cells += (f"{row['ops_per_s'] / 1e9:.0f}",)
        yield (*cells, f"{row['xla_s'] * 1e3:.3f}") if "xla_s" in row else cells


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
