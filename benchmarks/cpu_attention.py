"""Attention over pages on CPUs: time a token against context, and prefill, beside the read bandwidth of the same run.

    python -m benchmarks.cpu_attention                          # heads of TinyLlama-1.1B and Qwen2-0.5B
    python -m benchmarks.cpu_attention --quick --jsonl cpu_attention.jsonl

A step runs a layer after another over pools of their own, as a model does, so that nothing is read from a near cache
that a model would not find there. The native kernel and the path of XLA (gather the rows, then plain attention) take
turns with a read of 256 MB, each `--runs` times; figures are medians. The goal: t(n) - t(128) is at most 1.25 times the
added bytes of keys and values over that bandwidth.
"""

from __future__ import annotations

import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from fastgpt_jax.kernels.attention import AttentionSpec
from fastgpt_jax.kernels.cpu import library
from fastgpt_jax.kernels.cpu.attention import Scales, paged_attention
from passes.incremental.row_format import ROW_FORMATS
from passes.masks import Shifted, causal
from passes.ops.kv_update_read import kv_update_read

PAGE_SIZE = 16
GOAL = 1.25
MAX_POOL_BYTES = 1 << 29


@dataclass(frozen=True)
class Heads:
    """The attention of a model."""

    num_query: int
    num_kv: int
    size: int

    @property
    def row_numbers(self) -> int:
        """Numbers of a token's keys and values."""
        return 2 * self.num_kv * self.size


MODELS = {"TinyLlama-1.1B": Heads(32, 4, 64), "Qwen2-0.5B": Heads(14, 2, 64)}


@dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    models: tuple[str, ...]
    contexts: tuple[str, ...]
    prefills: tuple[str, ...]
    kv: tuple[str, ...]
    runs: int
    xla: bool
    quick: bool
    jsonl: str | None


def make_flags() -> flags.FlagValues:
    """Returns the flags, not parsed."""
    values = flags.FlagValues()
    flags.DEFINE_list("models", list(MODELS), f"Of {', '.join(MODELS)}.", flag_values=values)
    flags.DEFINE_list("contexts", ["128", "1024", "8192", "32768"], "Keys of a decoded token.", flag_values=values)
    flags.DEFINE_list("prefills", ["512", "2048"], "Tokens of a chunk of prefill.", flag_values=values)
    flags.DEFINE_list(
        "kv", ["float32"], "How rows are stored: float32, bfloat16 with queries alike, int8.", flag_values=values
    )
    flags.DEFINE_integer("runs", 15, "Times that each figure is taken.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("xla", True, "Also the path of XLA, for rows of float32.", flag_values=values)
    flags.DEFINE_bool("quick", False, "One model, contexts up to 8192, prefill of 512, 5 runs.", flag_values=values)
    flags.DEFINE_string("jsonl", None, "File that a line of JSON a figure is added to.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit code."""
    return run("cpu_attention", make_flags(), lambda values: execute(to_options(values, Options)), argv)


def execute(options: Options) -> None:
    """Measures every shape and prints its row."""
    if reason := library.unusable_reason():
        raise UserError(f"the native kernels are measured, and {reason}")
    models = options.models[:1] if options.quick else options.models
    if unknown := [name for name in models if name not in MODELS]:
        raise UserError(f"--models must be of {', '.join(MODELS)}, got {unknown[0]!r}")
    about = {"benchmark": "cpu_attention", "cores": os.cpu_count(), "machine": platform.machine()}
    about |= {"isa": library.isa(), "jax": jax.__version__, "commit": commit()}
    for name in models:
        for kv in options.kv:
            rows = list(measure(MODELS[name], kv, options))
            append_jsonl(options.jsonl, [{**about, "model": name, "kv": kv, **row} for row in rows])
            print(f"{name}, rows of {kv}\n{report(rows)}\n", flush=True)


def measure(heads: Heads, kv: str, options: Options) -> Iterator[dict[str, Any]]:
    """A row a shape."""
    runs = 5 if options.quick else options.runs
    shapes = [(1, int(n)) for n in options.contexts if not options.quick or int(n) <= 8192]
    shapes += [(int(n), int(n)) for n in options.prefills if not options.quick or int(n) <= 512]
    first: dict[str, Any] = {}
    for T, n in shapes:
        row = measure_shape(heads, kv, T, n, runs, options.xla and kv == "float32")
        if T == 1 and not first:
            first = row
        if T == 1 and row is not first:
            added_s = (row["kv_bytes"] - first["kv_bytes"]) / row["read_bytes_per_s"]
            row["share_of_bandwidth_time"] = (row["native_s"] - first["native_s"]) / added_s
        yield row


def measure_shape(heads: Heads, kv: str, T: int, n: int, runs: int, with_xla: bool) -> dict[str, Any]:
    """Seconds a layer, of T tokens that end a context of n."""
    size = {"float32": 4, "bfloat16": 2, "int8": 1}.get(kv)
    if size is None:
        raise UserError(f"--kv must be of float32, bfloat16 and int8, got {kv!r}")
    kv_bytes = n * heads.row_numbers * size
    num_layers = max(2, min(22, MAX_POOL_BYTES // kv_bytes)) if T == 1 else 2
    step = Step(heads, kv, T, n, num_layers)
    paths: dict[str, Callable[[], float]] = {"native": step.timer(_native)}
    if with_xla:
        paths["xla"] = step.timer(_xla)
    taken: dict[str, list[float]] = {name: [] for name in (*paths, "read")}
    for _ in range(runs):
        taken["read"].append(step.read_seconds())
        for name, timed in paths.items():
            taken[name].append(timed() / num_layers)
    row: dict[str, Any] = {"tokens": T, "context": n, "layers": num_layers, "kv_bytes": kv_bytes, "runs": runs}
    row |= {f"{name}_s": statistics.median(taken[name]) for name in paths}
    row["read_bytes_per_s"] = READ_BYTES / statistics.median(taken["read"])
    row["native_flops"] = 4 * heads.num_query * heads.size * T * (n - (T - 1) / 2) / row["native_s"]
    return row


READ_BYTES = 1 << 28


@functools.cache
def _read() -> tuple[Callable[[Any], Any], Any]:
    """Reads what is larger than any cache, by the library's own reader."""
    words = jnp.asarray(np.ones(READ_BYTES // 4, np.uint32))
    call = jax.ffi.ffi_call("fastgpt_read_sum", jax.ShapeDtypeStruct((1,), jnp.uint32))
    return jax.jit(call), words


class Step:
    """The attention of all layers of one step of one request, with the pools that it updates."""

    def __init__(self, heads: Heads, kv: str, T: int, n: int, num_layers: int):
        rng = np.random.default_rng(0)
        self.heads, self.T, self.n, self.num_layers = heads, T, n, num_layers
        M = -(-n // PAGE_SIZE)
        self.pages = jnp.asarray(rng.permutation(M).astype(np.int32))[None]
        self.positions = jnp.arange(n - T, n, dtype=jnp.int32)[None]
        queries = rng.standard_normal((1, T, heads.num_query, heads.size))
        self.query = jnp.asarray(queries, "bfloat16" if kv == "bfloat16" else "float32")
        rows = jnp.asarray(rng.standard_normal((2, 1, T, heads.num_kv, heads.size)), jnp.float32)
        layer = rng.standard_normal((1, M, PAGE_SIZE, heads.num_kv, heads.size)).astype(np.float32)
        pools = [jnp.asarray(np.broadcast_to(x, (num_layers, *layer.shape[1:]))) for x in (layer, layer[:, ::-1])]
        self.scales: list[Any] = []
        if kv == "int8":
            packed = [ROW_FORMATS["int8"].pack(x) for x in (rows[0], rows[1], *pools)]
            self.rows, self.pools = [x for x, _ in packed[:2]], [x for x, _ in packed[2:]]
            self.row_scales, self.scales = [s for _, s in packed[:2]], [s for _, s in packed[2:]]
        else:
            self.rows, self.pools = [x.astype(kv) for x in rows], [x.astype(kv) for x in pools]
            self.row_scales = []

    def timer(self, layer_of: Callable[..., Any]) -> Callable[[], float]:
        """Seconds that one step takes; the pools are donated and taken back."""

        def run_layers(pools: list[Any], scales: list[Any], query: Any) -> Any:
            for layer in range(self.num_layers):
                query, pools, scales = layer_of(self, query, pools, scales, jnp.int32(layer))
            return query, pools, scales

        compiled = jax.jit(run_layers, donate_argnums=(0, 1))

        def timed() -> float:
            begin = time.perf_counter()
            out, self.pools, self.scales = compiled(self.pools, self.scales, self.query)
            jax.block_until_ready(out)
            return time.perf_counter() - begin

        timed()
        return timed

    def read_seconds(self) -> float:
        read, words = _read()
        jax.block_until_ready(read(words))
        begin = time.perf_counter()
        jax.block_until_ready(read(words))
        return time.perf_counter() - begin


def _native(step: Step, query: Any, pools: list[Any], scales: list[Any], layer: Any) -> Any:
    spec = AttentionSpec(step.heads.size**-0.5, Shifted(causal(), 0))
    out, *after = paged_attention(
        spec,
        query,
        step.rows[0],
        step.rows[1],
        step.positions,
        step.pages,
        pools[0],
        pools[1],
        layers=[layer],
        num_keys=step.n,
        leaves=[step.positions[:, 0]],
        scales=Scales(*step.row_scales, *scales) if scales else None,
    )
    return out, after[:2], after[2:]


def _xla(step: Step, query: Any, pools: list[Any], scales: list[Any], layer: Any) -> Any:
    pairs = zip(pools, step.rows, strict=True)
    ways = {"length": step.n}
    found = [kv_update_read(p, [layer], r[0], step.positions[0], step.pages[0], **ways) for p, r in pairs]
    (key, _), (value, _) = found
    T, N, H = query.shape[1:]
    grouped = query[0].reshape(T, step.heads.num_kv, -1, H)
    scores = jnp.einsum("tkgh,skh->kgts", grouped, key) * H**-0.5
    seen = jnp.arange(step.n) <= step.positions[0][:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("kgts,skh->tkgh", weights, value).reshape(1, T, N, H)
    return out, [pool for _, pool in found], scales


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of what was found."""
    cells = []
    for row in rows:
        read = row["read_bytes_per_s"]
        share = row.get("share_of_bandwidth_time")
        cells.append(
            (
                f"{row['tokens']}",
                f"{row['context']}",
                f"{row['native_s'] * 1e6:.0f}",
                f"{row['xla_s'] * 1e6:.0f}" if "xla_s" in row else "",
                f"{row['kv_bytes'] / row['native_s'] / 1e9:.1f}" if row["tokens"] == 1 else "",
                f"{read / 1e9:.1f}",
                f"{share:.2f}{'' if share <= GOAL else ' (goal 1.25)'}" if share is not None else "",
                f"{row['native_flops'] / 1e9:.0f}",
            )
        )
    names = ("tokens", "context", "us a layer", "XLA", "KV GB/s", "read GB/s", "of the bandwidth's time", "GFLOP/s")
    return format_table(cells, names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
