"""Moves what never changes into the bodies of `scan`, `while` and `cond`: scalar constants, repeated operands, and
carries that every iteration hands on as they came.

Exact: a body sees the same values as before. Used by `passes.canonicalize`, which asks for it operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from passes.constants import scalar
from passes.graph import Op, Value
from passes.regions import Role, Slot, bodies, has_roles, keep_results, set_slots, slots

_CONSTANTS = (Role.CONST, Role.COND_CONST)


@dataclass
class Moved:
    """Number of operands moved, and results that are now known to be another value of the same graph."""

    changes: int = 0
    replaced: dict[Value, Value] = field(default_factory=dict)


def simplify_operands(op: Op, may_replace: Callable[[Value, Value], bool]) -> Moved:
    """Moves the operands of one region operation.

    Args:
      may_replace: Whether a result may be replaced by an operand.
    """
    moved = Moved()
    if has_roles(op):
        _unchanged_carries(op, may_replace, moved)
        _scalars_and_repeats(op, moved)
    return moved


def _unchanged_carries(op: Op, may_replace: Callable[[Value, Value], bool], moved: Moved) -> None:
    """Makes a carry that the body returns as it came a constant."""
    all_slots = slots(op)
    carries = [slot for slot in all_slots if slot.role is Role.CARRY]
    kept_results, constants, kept_carries = [], [], []
    for i, slot in enumerate(carries):
        (body,) = bodies(op)
        if body.outputs[i] is slot.inputs[-1][1] and may_replace(op.results[i], slot.operand):
            moved.replaced[op.results[i]] = slot.operand
            constants.append(slot)
        else:
            kept_carries.append(slot)
            kept_results.append(i)
    if not constants:
        return
    moved.changes += len(constants)
    keep_results(op, kept_results + list(range(len(carries), len(op.results))))
    as_constants = [replace(slot, role=Role.CONST, inputs=slot.inputs[-1:]) for slot in constants]
    as_cond_constants = []
    if op.name == "while":
        as_cond_constants = [replace(slot, role=Role.COND_CONST, inputs=slot.inputs[:1]) for slot in constants]
    by_role = {role: [slot for slot in all_slots if slot.role is role] for role in Role}
    set_slots(
        op,
        by_role[Role.COND_CONST]
        + as_cond_constants
        + by_role[Role.CONST]
        + as_constants
        + kept_carries
        + by_role[Role.SCANNED],
    )


def _scalars_and_repeats(op: Op, moved: Moved) -> None:
    """Puts scalar constants into the bodies, and passes each constant operand once."""
    kept: list[Slot] = []
    first: dict[tuple[Role, Value], Slot] = {}
    for slot in slots(op):
        if slot.role not in _CONSTANTS:
            kept.append(slot)
            continue
        twin = first.setdefault((slot.role, slot.operand), slot)
        if scalar(slot.operand) is not None:
            for region, value in slot.inputs:
                region.replace({value: Value(value.aval, const=slot.operand.const)})
        elif twin is not slot:
            for (region, value), (_, other) in zip(slot.inputs, twin.inputs, strict=True):
                region.replace({value: other})
        else:
            kept.append(slot)
            continue
        moved.changes += 1
    set_slots(op, kept)
