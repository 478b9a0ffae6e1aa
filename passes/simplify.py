"""Runs `canonicalize`, `cse` and `dce` until none of them changes anything: each uncovers work for the others.

Matches: what the three do. Does not match: what they do not. Must run after: nothing. Numerics: exact.
"""

from __future__ import annotations

from passes.canonicalize import canonicalize
from passes.cse import cse
from passes.dce import dce
from passes.graph import Graph
from passes.result import PassResult


def simplify(graph: Graph) -> PassResult:
    """Simplifies a graph to a common fixed point; counts all rewrites."""
    total = PassResult()
    while (result := canonicalize(graph) + cse(graph) + dce(graph)).matched:
        total += result
    return total
