"""Puts back the slices that a trace left out because they took the whole of an axis.

`table[:T]` is no operation at the length where T is the whole table, and a slice at every shorter one. So that two
traces of one program have the same operations, the longer one gets that slice again, which changes nothing in it.
Knows two traces and nothing else; where it guesses wrong, pairing the traces fails as it would have failed before.
"""

from __future__ import annotations

from passes.graph import Graph, Op, Value


def restore_full_slices(short: Graph, long: Graph) -> None:
    """Inserts into `long` a slice of everything wherever `short` has a slice that `long` has not."""
    partner = dict(zip(short.inputs, long.inputs, strict=True))
    for index, op in enumerate(short.ops):
        other = long.ops[index] if index < len(long.ops) else None
        if _is_left_out(op, other, partner):
            other = _slice_of_everything(op, partner[op.operands[0]])
            long.ops.insert(index, other)
        if other is None:
            return
        other.operands = _through_slices(op.operands, other.operands, partner)
        for region, other_region in zip(op.regions, other.regions, strict=False):
            restore_full_slices(region, other_region)
        partner.update(zip(op.results, other.results, strict=False))
    long.outputs = _through_slices(short.outputs, long.outputs, partner)


def _is_left_out(op: Op, other: Op | None, partner: dict[Value, Value]) -> bool:
    if op.name != "slice" or op.operands[0] not in partner or op.params["strides"] is not None:
        return False
    if any(op.params["start_indices"]):
        return False
    if other is None or other.name != "slice" or other.operands[0] is not partner[op.operands[0]]:
        return True
    return any(other.params["start_indices"])


def _slice_of_everything(op: Op, whole: Value) -> Op:
    params = {**op.params, "limit_indices": whole.shape}
    return Op(op.primitive, [whole], params, [whole.aval], source=op.source, effects=op.effects)


def _through_slices(values: list[Value], others: list[Value], partner: dict[Value, Value]) -> list[Value]:
    """The values of the longer trace, each behind the slice that its partner is behind."""
    if len(values) != len(others):
        return others
    return [_through(partner.get(value), other) for value, other in zip(values, others, strict=True)]


def _through(expected: Value | None, found: Value) -> Value:
    if expected is None or expected is found or expected.op is None or expected.op.name != "slice":
        return found
    return expected if expected.op.operands[0] is found and expected.shape == found.shape else found
