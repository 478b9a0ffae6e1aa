"""Merges operations that compute the same value: the same primitive on the same operands with the same parameters.

Matches: pure operations equal up to the identity of constants, whose bits are compared; region operations whose bodies
have the same structure. Does not match: operations with effects, stateful or scheduling ones, parameters that cannot be
compared. Must run after: `canonicalize`, which orders commutative operands. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from passes.constants import content_key
from passes.graph import Graph, Op, Value
from passes.result import PassResult

UNMERGEABLE = frozenset({"optimization_barrier", "rng_uniform"})


def cse(graph: Graph) -> PassResult:
    """Merges equal operations, in regions too; counts the operations merged."""
    return PassResult(_sweep(graph))


def _sweep(graph: Graph) -> int:
    seen: dict[Hashable, Op] = {}
    merged: dict[Value, Value] = {}
    kept, count = [], 0
    for op in graph.ops:
        op.operands = [merged.get(v, v) for v in op.operands]
        count += sum(_sweep(region) for region in op.regions)
        twin = None
        if not op.effects and op.name not in UNMERGEABLE:
            twin = seen.setdefault(_op_key(op, {}), op)
        if twin is None or twin is op:
            kept.append(op)
        else:
            merged.update(zip(op.results, twin.results, strict=True))
            count += 1
    graph.ops = kept
    graph.outputs = [merged.get(v, v) for v in graph.outputs]
    return count


def _op_key(op: Op, numbers: Mapping[Value, Hashable]) -> Hashable:
    return (
        op.primitive,
        tuple(_value_key(v, numbers) for v in op.operands),
        param_key(op.params),
        tuple(_type_key(v) for v in op.results),
        tuple(graph_key(region) for region in op.regions),
    )


def _value_key(value: Value, numbers: Mapping[Value, Hashable]) -> Hashable:
    if value.const is not None:
        return content_key(value.const)
    return numbers.get(value, value)


def _type_key(value: Value) -> Hashable:
    return (value.shape, str(value.dtype), bool(getattr(value.aval, "weak_type", False)))


def graph_key(graph: Graph) -> Hashable:
    """A key equal for regions of the same structure, whatever their values are called."""
    numbers: dict[Value, Hashable] = {v: ("input", i) for i, v in enumerate(graph.inputs)}
    keys = []
    for i, op in enumerate(graph.ops):
        keys.append((_op_key(op, numbers), id(op) if op.effects else None))
        numbers.update({v: ("op", i, j) for j, v in enumerate(op.results)})
    inputs = tuple(_type_key(v) for v in graph.inputs)
    return inputs, tuple(keys), tuple(_value_key(v, numbers) for v in graph.outputs)


def param_key(param: Any) -> Hashable:
    """A key for an operation's parameter; types count (`True`, `1` and `1.0` differ), the unhashable by identity."""
    if isinstance(param, (tuple, list)):
        return (type(param), tuple(param_key(x) for x in param))
    if isinstance(param, Mapping):
        return (dict, tuple(sorted(((str(k), param_key(v)) for k, v in param.items()), key=lambda item: item[0])))
    if isinstance(param, np.ndarray):
        return content_key(param)
    if isinstance(param, float):
        return (float, param.hex())
    try:
        hash(param)
    except TypeError:
        return ("object", id(param))
    return (type(param), param)
