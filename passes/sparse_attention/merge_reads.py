"""Joins what writes to a cache with the first of what reads some of its rows, where nothing reads all of them.

The one idea: an operation that writes rows of a pool and one without new rows that reads from what it left are one
operation that does both. Must run after `dce`. Numerics: exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passes.graph import Graph, Op, Value


def merge_reads(graph: Graph) -> int:
    """Rewrites one graph or region in place; returns how many were joined."""
    users = graph.users()
    outputs = set(graph.outputs)
    merged = 0
    for op in [op for op in graph.ops if op.name == "kv_update_read" and op.params["length"] is not None]:
        view, pool = op.results
        readers = users.get(pool, [])
        if view in users or view in outputs or not readers:
            continue
        first = min(readers, key=graph.ops.index)
        if not _only_reads(first) or not _same(first.operands[3], op.operands[3]):
            continue
        if not all(map(_same, first.operands[5:], op.operands[4:])):
            continue
        _join(graph, op, first)
        users = graph.users()
        merged += 1
    return merged


def _only_reads(op: Op) -> bool:
    return op.name == "kv_update_read" and op.params["length"] is None and op.operands[2].shape[-1] == 0


def _same(first: Value, second: Value) -> bool:
    if first.const is None or second.const is None:
        return first is second
    return np.array_equal(first.const, second.const)


def _join(graph: Graph, writer: Op, reader: Op) -> None:
    operands: Sequence[Value] = [*writer.operands[:4], reader.operands[4], *writer.operands[4:]]
    avals = [reader.results[0].aval, writer.results[1].aval]
    joined = Op(writer.primitive, list(operands), reader.params, avals, source=writer.source)
    graph.ops[graph.ops.index(reader)] = joined
    graph.ops.remove(writer)
    view, pool = joined.results
    graph.replace({reader.results[0]: view, reader.results[1]: pool, writer.results[1]: pool})
