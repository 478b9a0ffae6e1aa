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


def extract_between(inputs: Sequence[Value], outputs: Sequence[Value]) -> Graph:
    """What `extract` gives, found from the outputs alone: its time grows with the part and not with the program.

    Raises:
      ValueError: an output needs a value that no operation makes and that is not among `inputs`.
    """
    done, ops = set(inputs), list[Op]()
    stack = [(value, False) for value in reversed(outputs)]
    while stack:
        value, is_ready = stack.pop()
        if value in done or value.const is not None:
            continue
        if value.op is None:
            raise ValueError(f"the outputs must be made of the inputs named, but need input {value!r} too")
        if is_ready:
            done.update(value.op.results)
            ops.append(value.op)
        else:
            stack.append((value, True))
            stack += [(operand, False) for operand in reversed(value.op.operands)]
    return _copy(ops, inputs, outputs)


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
