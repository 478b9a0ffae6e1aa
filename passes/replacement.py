"""Makes a rewrite in a graph: what a function computes takes the place of a value.

Knows no pattern. For passes that rewrite a few places; `passes.patterns.driver.Editor` is for those that rewrite many.
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.extract import clone
from passes.graph import Graph, Value


def replace(graph: Graph, body: Graph, operands: Sequence[Value], old: Value) -> None:
    """Makes a rewrite: `old` and all that reads it now come from a copy of `body`. What is dead stays for `dce`."""
    body = clone(body)
    inputs = dict(zip(body.inputs, operands, strict=True))
    body.replace(inputs)
    new = body.outputs[0]
    at = graph.ops.index(old.op) if old.op is not None else 0
    graph.ops[at:at] = body.ops
    graph.replace({old: new})
