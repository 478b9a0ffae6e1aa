"""Brings a graph into one spelling, op by op and exactly, so that later passes have less to recognise.

Matches: the identities of `passes.identities`; scalar arithmetic on constants; commutative operands out of order
(constants last, else in order of definition); a `cond` whose index is known; scalar constants, repeated operands and
carries that never change, which move into the bodies of `scan`, `while` and `cond`. Works inside regions too.
Does not match: whatever would change one bit of a result, or the weak type of an output. Must run after: nothing; it
runs to its own fixed point, but `cse` and `dce` may uncover more (`passes.simplify` runs all three). Numerics: exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from passes import compat
from passes.constants import scalar
from passes.graph import Graph, Op, Value
from passes.identities import RULES, mirrored
from passes.loop_operands import simplify_operands
from passes.result import PassResult

# Left out are float `max` and `min`: on two zeros of opposite sign the order may decide.
_COMMUTATIVE = frozenset({"add", "mul", "and", "or", "xor", "eq", "ne"})
_INTEGER_COMMUTATIVE = frozenset({"max", "min"})
_COMPARISONS = frozenset({"lt", "le", "gt", "ge"})

_FOLDABLE = frozenset(
    "abs add and atan2 cbrt ceil clamp convert_element_type cos cosh div eq erf exp exp2 expm1 floor ge gt integer_pow "
    "is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor".split()
)


def canonicalize(graph: Graph) -> PassResult:
    """Rewrites a graph until nothing changes; counts the rewrites."""
    result = PassResult()
    while changed := _sweep(graph):
        result += PassResult(changed)
    return result


def _sweep(graph: Graph) -> int:
    """One walk over the operations; returns the number of rewrites."""
    outputs, rank = set(graph.outputs), {value: i for i, value in enumerate(graph.inputs)}
    replaced: dict[Value, Value] = {}
    ops: list[Op] = []
    count = 0
    for op in graph.ops:
        op.operands = [replaced.get(v, v) for v in op.operands]
        count += sum(_sweep(region) for region in op.regions)
        moved = simplify_operands(op, may_replace=lambda old, new: _may_replace(old, new, outputs))
        count += moved.changes
        replaced.update(moved.replaced)
        new = _known_branch(op) or _rewrite(op, rank)
        if new is not None and all(_may_replace(a, b, outputs) for a, b in zip(op.results, new.values, strict=True)):
            count += 1
            replaced.update(zip(op.results, new.values, strict=True))
        else:
            new = _Rewritten([op], op.results)
        for new_op in new.ops:
            rank.update({value: len(rank) for value in new_op.results})
        ops.extend(new.ops)
    graph.ops = ops
    graph.outputs = [replaced.get(v, v) for v in graph.outputs]
    return count


@dataclass(frozen=True)
class _Rewritten:
    """What stands in the place of an operation: other operations, and the values its results become."""

    ops: list[Op]
    values: list[Value]


def _may_replace(old: Value, new: Value, outputs: set[Value]) -> bool:
    """Whether `new` has the type of `old`; weak types matter where a caller sees them, at outputs."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return False
    if getattr(old.aval, "sharding", None) != getattr(new.aval, "sharding", None):
        return False
    return old not in outputs or getattr(old.aval, "weak_type", False) == getattr(new.aval, "weak_type", False)


def _rewrite(op: Op, rank: dict[Value, int]) -> _Rewritten | None:
    if op.effects or op.regions or len(op.results) != 1:
        return None
    new = _fold(op)
    for rule in RULES.get(op.name, ()):
        if new is None:
            candidate = rule(op)
            is_value = isinstance(candidate, Value)
            new = None if is_value and not _may_replace(op.result, candidate, set()) else candidate
    new = new or _ordered(op, rank)
    if new is None:
        return None
    return _Rewritten([], [new]) if isinstance(new, Value) else _Rewritten([new], new.results)


def _fold(op: Op) -> Value | None:
    """The constant that an operation on scalar constants gives, computed by the operation itself."""
    if op.name not in _FOLDABLE or op.result.shape or any(scalar(v) is None for v in op.operands):
        return None
    with jax.ensure_compile_time_eval():
        (result,) = compat.bind(op.primitive, [v.const for v in op.operands], op.params)
    return Value(op.result.aval, const=np.asarray(result))


def _ordered(op: Op, rank: dict[Value, int]) -> Op | None:
    """`op` with its operands in order, where that leaves the result as it is; None where they are."""
    if len(op.operands) != 2:
        return None
    left, right = (rank.get(v, np.inf) for v in op.operands)
    if left <= right:
        return None
    if op.name in _COMPARISONS:
        return mirrored(op)
    if op.name in _COMMUTATIVE or (op.name in _INTEGER_COMMUTATIVE and not compat.is_inexact(op.result.dtype)):
        return Op(op.primitive, op.operands[::-1], op.params, [op.result.aval], source=op.source)
    return None


def _known_branch(op: Op) -> _Rewritten | None:
    """The operations and results of the branch that a `cond` with a known index takes."""
    if op.name != "cond" or op.effects:
        return None
    index = scalar(op.operands[0])
    if index is None:
        return None
    branch = op.regions[int(np.clip(int(index), 0, len(op.regions) - 1))]
    branch.replace(dict(zip(branch.inputs, op.operands[1:], strict=True)))
    branch.inputs = list(op.operands[1:])
    return _Rewritten(branch.ops, branch.outputs)
