"""Copies the part of a graph between some of its values and others into a graph that shares nothing mutable with it."""

from __future__ import annotations

from collections.abc import Sequence

from passes.graph import Graph, Op, Value


def extract(graph: Graph, inputs: Sequence[Value], outputs: Sequence[Value], *, with_effects: bool = False) -> Graph:
    """The program that makes `outputs` from `inputs`, with only the operations that takes.

    Args:
      inputs: Values of `graph`; an operation's result among them is taken as given, not made.
      with_effects: Whether operations with effects come along though no output reads them.

    Raises:
      ValueError: an output needs an input of `graph` that is not among `inputs`.
    """
    given, needed, ops = set(inputs), set(outputs), []
    for op in reversed(graph.ops):
        if any(r in needed and r not in given for r in op.results) or (with_effects and op.effects):
            ops.append(op)
            needed.update(op.operands)
    missing = [i for i, v in enumerate(graph.inputs) if v in needed and v not in given]
    if missing:
        raise ValueError(f"the outputs must be made of the inputs named, but need input {missing[0]} of the graph too")
    return _copy(ops[::-1], inputs, outputs)


def clone(graph: Graph) -> Graph:
    """A copy with values and operations of its own, regions too."""
    return _copy(graph.ops, graph.inputs, graph.outputs)


def _copy(ops: Sequence[Op], inputs: Sequence[Value], outputs: Sequence[Value]) -> Graph:
    copies = {value: Value(value.aval, path=value.path) for value in inputs}

    def copied(value: Value) -> Value:
        return value if value.const is not None else copies[value]

    graph = Graph([copies[value] for value in inputs])
    for op in ops:
        regions = tuple(clone(region) for region in op.regions)
        avals = [result.aval for result in op.results]
        twin = Op(op.primitive, [copied(v) for v in op.operands], op.params, avals, regions, op.source, op.effects)
        copies.update({old: new for old, new in zip(op.results, twin.results, strict=True) if old not in copies})
        graph.ops.append(twin)
    graph.outputs = [copied(v) for v in outputs]
    return graph
