"""What a rewritten program must satisfy: so many attentions found, and nothing computed otherwise.

Compares in float64, where only the mathematics counts, and in the dtypes as written, where casts count too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from passes import compat
from passes.attention.rewrite import attention
from passes.expand import expand
from passes.extract import clone
from passes.graph import Graph
from passes.reader import trace
from passes.replay import Widening, evaluate
from passes.simplify import simplify

IN_FLOAT64 = 1e-6
"""Relative to the largest result; constants such as log2(e) are float32 in the program."""
AS_WRITTEN = {"float32": 1e-5, "bfloat16": 6e-2}
"""The same in the dtypes as written. bfloat16 scores of 8 are wrong by 1/32 already, and are rounded in both."""


def rewritten(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Graph, Graph, list[str]]:
    """The simplified program before and after, and what was said of near misses."""
    graph, _ = trace(fn, *args)
    simplify(graph)
    before = clone(graph)
    result = attention(graph)
    assert result.matched == count(graph), "a match that is not in the program"
    return before, graph, [str(remark) for remark in result.remarks]


def count(graph: Graph) -> int:
    return sum(op.name == "attention" for _, op in graph.walk())


def assert_found(
    name: str, fn: Callable[..., Any], args: Sequence[Any], num: int = 1, *, as_written: bool = True
) -> Graph:
    """Returns: The program after."""
    before, after, remarks = rewritten(fn, args)
    assert count(after) == num, f"{count(after)} of {num} attentions found in {name}: {remarks}"
    assert_same(name, before, after, args, as_written=as_written)
    return after


def assert_same(name: str, before: Graph, after: Graph, args: Sequence[Any], *, as_written: bool = True) -> None:
    wide, expanded = Widening("float64"), expand(after)

    def run(*xs: Any) -> Any:
        exact = evaluate(before, xs, wide), evaluate(expanded, xs, wide)
        return exact, (evaluate(before, xs), evaluate(after, xs)) if as_written else ((), ())

    with jax.enable_x64(True):
        exact, written = compat.quick_jit(run)(*args)
    for expected, actual in zip(*exact, strict=True):
        assert_close(name, expected, actual, IN_FLOAT64)
    is_narrow = any(v.dtype == "bfloat16" for _, op in before.walk() for v in op.results)
    for expected, actual in zip(*written, strict=True):
        assert_close(name, expected, actual, AS_WRITTEN["bfloat16" if is_narrow else "float32"])


def assert_close(name: str, expected: Any, actual: Any, tolerance: float) -> None:
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    assert np.isfinite(expected).all(), f"{name} gives numbers that are not finite"
    error = np.max(np.abs(expected - actual), initial=0) / np.max(np.abs(expected), initial=1e-9)
    assert error < tolerance, f"error {error:.1e} in {name}"
