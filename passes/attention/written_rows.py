"""Whether a mask lets queries see rows of a cache that nobody has written.

Knows no kernel. The one idea: query i of a step stands at position `start + i`, and the rows up to there are written
before any is read; a mask that is known to hide what lies behind a query hides what is not there.
"""

from __future__ import annotations

from collections.abc import Collection

from jax import lax

from passes.attention.expression import Apply, Constant, Expression, Leaf
from passes.attention.kernel_form import KernelForm
from passes.masks import And, KeyLength, Mask, Nothing, Offset, Or, Shifted


def sees_written_only(form: KernelForm, starts: Collection[int], num_queries: int) -> bool:
    """Whether no query is known to see a key past its own position.

    Args:
      starts: The operation's leaves that hold the position of a request's first query.
    """
    return _hides_behind(form.mask, form.leaves, starts, num_queries)


def _hides_behind(mask: Mask, leaves: tuple[Expression, ...], starts: Collection[int], num_queries: int) -> bool:
    if isinstance(mask, And):
        return any(_hides_behind(term, leaves, starts, num_queries) for term in mask.terms)
    if isinstance(mask, Or):
        return all(_hides_behind(term, leaves, starts, num_queries) for term in mask.terms)
    if isinstance(mask, Shifted):
        return _past_start(leaves[mask.leaf], starts) == 0 and _is_causal(mask.mask)
    if isinstance(mask, KeyLength):
        past = _past_start(leaves[mask.leaf], starts)
        return past is not None and past <= 1
    return isinstance(mask, Nothing)


def _is_causal(mask: Mask) -> bool:
    if isinstance(mask, And):
        return any(map(_is_causal, mask.terms))
    if isinstance(mask, Or):
        return all(map(_is_causal, mask.terms))
    return isinstance(mask, Nothing) or (isinstance(mask, Offset) and mask.lo is not None and mask.lo >= 0)


def _past_start(expression: Expression, starts: Collection[int]) -> int | None:
    """`n` of `start + n`; None for anything else."""
    if isinstance(expression, Leaf):
        return 0 if expression.number in starts else None
    if not isinstance(expression, Apply):
        return None
    if expression.primitive is lax.convert_element_type_p:
        return _past_start(expression.operands[0], starts)
    if expression.name != "add":
        return None
    known = [int(node.value) for node in expression.operands if isinstance(node, Constant)]
    rest = [_past_start(node, starts) for node in expression.operands if not isinstance(node, Constant)]
    return known[0] + rest[0] if len(known) == 1 and len(rest) == 1 and rest[0] is not None else None
