"""How the operands, results and bodies of `scan`, `while` and `cond` correspond, and how to drop or move one of them.

The one idea: each operand of such an operation has a *role* (constant, carry, scanned input ...) and one input in each
region that reads it. Passes speak of roles and never of offsets. Values that stay keep their identity.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from passes.graph import Graph, Op, Value


class Role(enum.Enum):
    """What an operand is to the operation."""

    CONST = "const"  # the same in every iteration or branch
    COND_CONST = "cond_const"  # the same in every iteration, read by the condition of a `while`
    CARRY = "carry"
    SCANNED = "scanned"
    INDEX = "index"  # chooses the branch of a `cond`


@dataclass(frozen=True)
class Slot:
    """One operand with the region inputs that stand for it."""

    operand: Value
    role: Role
    inputs: tuple[tuple[Graph, Value], ...]


def has_roles(op: Op) -> bool:
    """Whether this module knows the bodies of `op`."""
    return op.name in ("scan", "while", "cond")


def slots(op: Op) -> list[Slot]:
    """Every operand with its role, in order."""
    roles = list(_roles(op))
    counters = [0] * len(op.regions)
    out = []
    for operand, role in zip(op.operands, roles, strict=True):
        inputs = []
        for i, region in enumerate(op.regions):
            if _reads(op, i, role):
                inputs.append((region, region.inputs[counters[i]]))
                counters[i] += 1
        out.append(Slot(operand, role, tuple(inputs)))
    return out


def _roles(op: Op) -> Iterator[Role]:
    n = len(op.operands)
    if op.name == "scan":
        consts, carries = op.params["num_consts"], op.params["num_carry"]
        yield from [Role.CONST] * consts + [Role.CARRY] * carries + [Role.SCANNED] * (n - consts - carries)
    elif op.name == "while":
        cond, body = op.params["cond_nconsts"], op.params["body_nconsts"]
        yield from [Role.COND_CONST] * cond + [Role.CONST] * body + [Role.CARRY] * (n - cond - body)
    else:
        yield from [Role.INDEX] + [Role.CONST] * (n - 1)


def _reads(op: Op, region: int, role: Role) -> bool:
    """Whether region number `region` has an input for operands of `role`."""
    if op.name == "while":
        return role is Role.CARRY or role is (Role.COND_CONST if region == 0 else Role.CONST)
    return role is not Role.INDEX


def set_slots(op: Op, kept: list[Slot]) -> None:
    """Makes `kept`, ordered by role as the operation demands, the operands and region inputs of `op`.

    The caller sees to the regions' outputs and the results.
    """
    op.operands = [slot.operand for slot in kept]
    for region in op.regions:
        region.inputs = [value for slot in kept for owner, value in slot.inputs if owner is region]
    count = {role: sum(slot.role is role for slot in kept) for role in Role}
    if op.name == "scan":
        op.params |= {"num_consts": count[Role.CONST], "num_carry": count[Role.CARRY]}
    elif op.name == "while":
        op.params |= {"cond_nconsts": count[Role.COND_CONST], "body_nconsts": count[Role.CONST]}


def bodies(op: Op) -> tuple[Graph, ...]:
    """The regions whose outputs become results: all but the condition of a `while`."""
    return op.regions[1:] if op.name == "while" else op.regions


def keep_results(op: Op, kept: list[int]) -> None:
    """Drops all results but those numbered in `kept`, with the body outputs that made them."""
    for body in bodies(op):
        body.outputs = [body.outputs[i] for i in kept]
    op.results = [op.results[i] for i in kept]
    for i, result in enumerate(op.results):
        result.index = i
