"""Masks laid over the scores of the attention operation, and scores for some of its heads.

The one idea: a mask becomes comparisons of the same indices that the program's own mask compares, so that whoever takes
the scores apart again (`passes.attention.simplify_mask`) finds one mask of the algebra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.attention.expression import ROLES, Apply, Constant, Expression, Index, Role, evaluate, rewrite
from passes.attention.simplify_mask import LARGEST_FILL
from passes.masks import All, And, KeyRange, Mask, Offset, Or


def lay_over(score: Expression, dtype: Any, mask: Mask, query_start: Expression | None) -> Expression:
    """The scores where a mask holds, else a fill.

    Args:
      dtype: Of the scores.
      query_start: What is added to a query's index to give its position, as the program's own mask has it.
    """
    query: Expression = Index("t", "int32")
    if query_start is not None:
        query = Apply(lax.add_p, (), (query, query_start))
    seen = _predicate(mask, query, Index("s", "int32"))
    return Apply(lax.select_n_p, (), (seen, Constant(fill_of(dtype), str(np.dtype(dtype))), score))


def fill_of(dtype: Any) -> float:
    """The least finite number, with which a row that sees nothing stays finite; where that is no fill, -inf."""
    least = float(jnp.finfo(dtype).min)
    return least if least <= LARGEST_FILL else -np.inf


def _predicate(mask: Mask, query: Expression, key: Expression) -> Expression:
    if isinstance(mask, All):
        return Constant(True, "bool")
    if isinstance(mask, And | Or):
        out, *rest = (_predicate(term, query, key) for term in mask.terms)
        for term in rest:
            out = Apply(lax.and_p if isinstance(mask, And) else lax.or_p, (), (out, term))
        return out
    if isinstance(mask, Offset | KeyRange):
        number = key if isinstance(mask, KeyRange) else Apply(lax.sub_p, (), (query, key))
        parts = []
        if mask.lo is not None:
            parts.append(Apply(lax.ge_p, (), (number, Constant(mask.lo, "int32"))))
        if mask.end is not None:
            parts.append(Apply(lax.lt_p, (), (number, Constant(mask.end, "int32"))))
        return parts[0] if len(parts) == 1 else Apply(lax.and_p, (), tuple(parts))
    raise TypeError(f"no rule of a clause makes {mask!r}")


def of_heads(score: Expression, first: int) -> Expression:
    """The scores of an operation whose head 0 is head `first`."""

    def changed(node: Expression) -> Expression | None:
        if isinstance(node, Index) and node.role == "n":
            return Apply(lax.add_p, (), (node, Constant(first, node.dtype)))
        return None

    return rewrite(score, changed) if first else score


def score_dtype(score: Expression, core_dtype: Any, leaf_dtypes: Sequence[Any]) -> Any:
    """The dtype of the scores."""
    one = (1, 1, 1, 1)
    core, *leaves = (jax.ShapeDtypeStruct(one, dtype) for dtype in (core_dtype, *leaf_dtypes))
    indices: dict[Role, Any] = {role: jnp.zeros(one, jnp.int32) for role in ROLES}
    return jax.eval_shape(lambda core, *leaves: evaluate(score, core, indices, leaves), core, *leaves).dtype
