"""Drops what a program says about where its values lie, so that it can be compiled for any number of devices.

Matches: `sharding_constraint`, in bodies of loops too. Does not match: `shard_map`, which computes by device. Must run
after: nothing. Numerics: exact.
"""

from __future__ import annotations

from passes.graph import Graph


def drop_placement(graph: Graph) -> int:
    """Rewrites in place; returns how many operations were dropped."""
    num_dropped = 0
    for inner in {id(g): g for g in [graph, *(region for _, op in graph.walk() for region in op.regions)]}.values():
        dropped = [op for op in inner.ops if op.name == "sharding_constraint"]
        inner.replace({op.result: op.operands[0] for op in dropped})
        inner.ops = [op for op in inner.ops if op.name != "sharding_constraint"]
        num_dropped += len(dropped)
    return num_dropped
