"""Puts what a function computes in the place of a value, and says what was replaced by what, so that it can be checked.

Knows no pattern. The one idea: a rewrite is made of two closed graphs, taken from the program before it is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from passes.extract import clone, extract
from passes.graph import Graph, Op, Value
from passes.numerics import Numerics
from passes.reader import trace
from passes.rewrite import Rewrite


def make_replacement(
    graph: Graph, rule: str, numerics: Numerics, fn: Callable[..., Any], operands: Sequence[Value], old: Value
) -> Rewrite:
    """The rewrite that computes `old` as `fn(*operands)`; the graph stays as it is.

    Args:
      operands: Values of `graph` that `old` depends on and `fn` takes; no constants.
    """
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=getattr(v.aval, "weak_type", False)) for v in operands]
    after, _ = trace(fn, *shapes)
    new = after.outputs[0]
    if len(after.outputs) != 1 or new.shape != old.shape or new.dtype != old.dtype:
        raise RuntimeError(f"{rule} gives {after.outputs} in place of {old}")
    for _, op in after.walk():
        op.source = old.source
    return Rewrite(rule, numerics, extract(graph, operands, [old]), after, old.source)


def replace(graph: Graph, rewrite: Rewrite, operands: Sequence[Value], old: Value) -> None:
    """Makes a rewrite: `old` and all that reads it now come from `rewrite.after`. What is dead stays for `dce`."""
    body = clone(rewrite.after)
    inputs = dict(zip(body.inputs, operands, strict=True))
    body.replace(inputs)
    new = body.outputs[0]
    at = graph.ops.index(old.op) if old.op is not None else 0
    graph.ops[at:at] = body.ops
    graph.replace({old: new})


def live_without(graph: Graph, dead: Value, kept: Sequence[Value]) -> set[Op]:
    """Operations that are still needed once `dead` comes from `kept` alone."""
    needed: set[Op] = set()
    stack = [*graph.outputs, *kept, *(v for op in graph.ops if op.effects for v in op.operands)]
    seen: set[Value] = set()
    while stack:
        value = stack.pop()
        if value in seen or value is dead or value.op is None:
            continue
        seen.add(value)
        if value.op not in needed:
            needed.add(value.op)
            stack.extend(value.op.operands)
    return needed
