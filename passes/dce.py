"""Drops operations whose results nothing reads, and inside `scan`, `while` and `cond` the outputs, carries and operands
that only feed what is dropped. Operations with effects stay.

Matches: pure operations without readers; results, carries and operands of region operations that no live value needs.
Does not match: graph inputs (the signature stays). Must run after: nothing. Numerics: exact.
"""

from __future__ import annotations

from passes.graph import Graph, Op, Value
from passes.regions import Role, bodies, has_roles, keep_results, set_slots, slots
from passes.result import PassResult


def dce(graph: Graph) -> PassResult:
    """Drops dead code; counts the operations, results and operands dropped."""
    return PassResult(_sweep(graph))


def _sweep(graph: Graph) -> int:
    live, kept, dropped = set(graph.outputs), [], 0
    for op in reversed(graph.ops):
        if not op.effects and not any(result in live for result in op.results):
            dropped += 1
            continue
        if has_roles(op):
            dropped += _prune(op, live)
        else:
            dropped += sum(_sweep(region) for region in op.regions)
        live.update(op.operands)
        kept.append(op)
    graph.ops = kept[::-1]
    return dropped


def _prune(op: Op, live: set[Value]) -> int:
    """Prunes one region operation, given the values of its graph that are read after it."""
    results = _live_results(op, live)
    dropped = len(op.results) - len(results)
    before = slots(op)
    carry_of = [i for i, slot in enumerate(before) if slot.role is Role.CARRY]
    keep_results(op, results)
    dropped += sum(_sweep(region) for region in op.regions)
    read = {value for region in op.regions for inner in region.ops for value in inner.operands}
    read |= {value for region in op.regions for value in region.outputs}
    kept = []
    for i, slot in enumerate(before):
        if slot.role is Role.CARRY:
            is_live = carry_of.index(i) in results
        else:
            is_live = slot.role is Role.INDEX or any(value in read for _, value in slot.inputs)
        if is_live:
            kept.append(slot)
    dropped += len(before) - len(kept)
    set_slots(op, kept)
    return dropped


def _live_results(op: Op, live: set[Value]) -> list[int]:
    """Numbers of the results that are read, or that later iterations need to make what is read."""
    wanted = {i for i, result in enumerate(op.results) if result in live}
    carries = [slot for slot in slots(op) if slot.role is Role.CARRY]
    if op.name == "while":
        needed = _needed(op.regions[0], set(op.regions[0].outputs))
        wanted |= {i for i, slot in enumerate(carries) if slot.inputs[0][1] in needed}
    while carries:
        (body,) = bodies(op)
        needed = _needed(body, {body.outputs[i] for i in wanted})
        more = {i for i, slot in enumerate(carries) if slot.inputs[-1][1] in needed}
        if more <= wanted:
            break
        wanted |= more
    return sorted(wanted)


def _needed(graph: Graph, roots: set[Value]) -> set[Value]:
    """The values that `roots` and the operations with effects are made of; nested regions are not looked into."""
    needed = set(roots)
    for op in reversed(graph.ops):
        if op.effects or any(result in needed for result in op.results):
            needed.update(op.operands)
    return needed
