"""Rules that differ between heads (`where(head < 2, window, causal)`), decided for one head at a time.

Matches: predicates that compute with the index of the head, and with constant arrays along the heads. Does not match:
arrays along the heads that are known only when the program runs. The one idea: for a given head its index is a number,
and what is left of the predicate is a rule of positions like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from passes.attention.expression import Apply, Constant, Expression, Index, Leaf, evaluate, rewrite, walk
from passes.attention.predicates import is_boolean, roles_of
from passes.graph import Op, Value


def has_head_rules(op: Op) -> bool:
    """Whether what an attention hides depends on the head."""
    return any(is_boolean(node) and "n" in roles_of(node) for node in walk(op.params["score"]))


def scores_by_head(op: Op) -> list[Expression] | None:
    """For each query head the scores with the rules of that head; None where they are known only at run time.

    What else knows the head, such as a bias, still does.
    """
    score, num_heads = op.params["score"], op.operands[0].shape[2]
    if not has_head_rules(op):
        return [score] * num_heads
    leaves = op.operands[3 : 3 + op.params["num_leaves"]]
    decided = [_decided(score, head, leaves) for head in range(num_heads)]
    known = [score for score in decided if score is not None]
    return known if len(known) == num_heads else None


def _decided(score: Expression, head: int, leaves: Sequence[Value]) -> Expression | None:
    new: dict[Expression, Expression] = {}
    for node in _predicates(score):
        new[node] = rewrite(node, lambda part: _folded(_of_head(part, head, leaves)))
        if "n" in roles_of(new[node]):
            return None
    return _replaced(score, new)


def _predicates(node: Expression) -> list[Expression]:
    """The largest predicates that know the head."""
    if "n" not in roles_of(node) or not isinstance(node, Apply):
        return [node] if is_boolean(node) and "n" in roles_of(node) else []
    if is_boolean(node):
        return [node]
    return [found for operand in node.operands for found in _predicates(operand)]


def _replaced(node: Expression, new: dict[Expression, Expression]) -> Expression:
    if node in new:
        return new[node]
    if not isinstance(node, Apply):
        return node
    return Apply(node.primitive, node.params, tuple(_replaced(operand, new) for operand in node.operands))


def _of_head(node: Expression, head: int, leaves: Sequence[Value]) -> Expression:
    if isinstance(node, Index) and node.role == "n":
        return Constant(head, node.dtype)
    if isinstance(node, Leaf) and node.roles == ("n",):
        const = leaves[node.number].const
        if isinstance(const, np.ndarray):
            return Constant(const.reshape(-1)[head].item(), node.dtype)
    return node


def _folded(node: Expression) -> Expression:
    """The node with what its constants decide decided."""
    if not isinstance(node, Apply):
        return node
    if all(isinstance(operand, Constant) for operand in node.operands):
        with jax.ensure_compile_time_eval():
            value = np.asarray(evaluate(node, None, {}, ()))
        return Constant(value.item(), str(value.dtype))
    if node.name == "select_n" and isinstance(node.operands[0], Constant):
        return node.operands[1 + int(node.operands[0].value)]
    if node.primitive in (lax.and_p, lax.or_p) and is_boolean(node):
        for one, other in (node.operands, node.operands[::-1]):
            if isinstance(one, Constant):
                is_neutral = bool(one.value) == (node.primitive is lax.and_p)
                return other if is_neutral else one
    return node
