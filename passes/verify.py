"""Checks that a graph is well formed: every value defined once and before its use, regions that fit the operations that
own them, and every type the one that abstract evaluation gives.

Knows nothing of what a graph computes. Weak types are not compared: a rewrite may lose one where no caller sees it.
"""

from __future__ import annotations

from passes import compat
from passes.graph import Graph, Op, Value
from passes.regions import Role, bodies, has_roles, slots


class MalformedGraph(RuntimeError):
    """A pass left a graph that breaks an invariant; the message names the operation and the user's line."""


def verify(graph: Graph) -> None:
    """Checks a graph and its regions.

    Raises:
      MalformedGraph: naming the first operation that breaks an invariant.
    """
    defined: set[Value] = set()
    for value in graph.inputs:
        if value.op is not None or value.const is not None or value in defined:
            raise MalformedGraph("an input of a graph must be a fresh value without an operation or a constant")
        defined.add(value)
    for op in graph.ops:
        _check_uses(op, op.operands, defined)
        for i, result in enumerate(op.results):
            if result.op is not op or result.index != i:
                raise _broken(op, f"result {i} must know its operation and its number")
        if any(result in defined for result in op.results):
            raise _broken(op, "stands in the graph twice")
        defined.update(op.results)
        for region in op.regions:
            verify(region)
        _check_types(op)
    for value in graph.outputs:
        if value.const is None and value not in defined:
            raise MalformedGraph(f"output {value} is not defined in its graph; its source is {value.source}")


def _check_uses(op: Op, operands: list[Value], defined: set[Value]) -> None:
    for i, value in enumerate(operands):
        if value.const is None and value not in defined:
            raise _broken(op, f"operand {i} ({value}) is used before it is defined, or belongs to another graph")


def _check_types(op: Op) -> None:
    if has_roles(op):
        _check_regions(op)
        return
    try:
        inferred = compat.infer_types(op.primitive, [v.aval for v in op.operands], op.params)
    except (TypeError, ValueError) as error:
        raise _broken(op, f"operands do not fit: {error}") from error
    if inferred is None:
        return
    if len(inferred) != len(op.results):
        raise _broken(op, f"has {len(op.results)} results, abstract evaluation gives {len(inferred)}")
    for result, aval in zip(op.results, inferred, strict=True):
        if result.shape != tuple(aval.shape) or result.dtype != aval.dtype:
            raise _broken(op, f"result is {result}, abstract evaluation gives {aval}")


def _check_regions(op: Op) -> None:
    try:
        all_slots = slots(op)
    except (IndexError, ValueError) as error:
        raise _broken(op, "operands and region inputs do not correspond") from error
    for region in op.regions:
        if len(region.inputs) != sum(owner is region for slot in all_slots for owner, _ in slot.inputs):
            raise _broken(op, "operands and region inputs do not correspond")
    for slot in all_slots:
        shape = slot.operand.shape[1:] if slot.role is Role.SCANNED else slot.operand.shape
        for _, value in slot.inputs:
            if value.shape != shape or value.dtype != slot.operand.dtype:
                raise _broken(op, f"{slot.role.value} operand {slot.operand} does not fit region input {value}")
    num_carry = op.params.get("num_carry", len(op.results))
    for body in bodies(op):
        if len(body.outputs) != len(op.results):
            raise _broken(op, f"has {len(op.results)} results and a body with {len(body.outputs)} outputs")
        for i, (result, value) in enumerate(zip(op.results, body.outputs, strict=True)):
            shape = value.shape if i < num_carry else (op.params["length"], *value.shape)
            if result.shape != shape or result.dtype != value.dtype:
                raise _broken(op, f"result {i} is {result}, its body gives {value}")
    if op.name == "while":
        test = op.regions[0].outputs
        if len(test) != 1 or test[0].shape != () or test[0].dtype != bool:
            raise _broken(op, "the condition must give one boolean scalar")


def _broken(op: Op, what: str) -> MalformedGraph:
    return MalformedGraph(f"{op.name} at {op.source}: {what}")
