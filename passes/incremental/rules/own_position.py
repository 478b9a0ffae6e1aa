"""Recognises an index that is its own position, as in `zeros.at[jnp.arange(T)[:, None], expert].set(weight)`.

Such a write stays in its row: among the rows of the new tokens it is the same write, with rows counted from the first.
"""

from __future__ import annotations

import numpy as np

from passes.graph import Op, Value
from passes.incremental.rules.layout import dimension_groups


def own_position_dim(index: Value, component: int) -> int | None:
    """The dimension of a scatter's index along which one component counts 0, 1, 2 ..., or None.

    Args:
      index: i32 [..., components], as `jnp` concatenates it of one part a component.
    """
    op = index.op
    if op is None or op.name != "concatenate" or op.params["dimension"] != len(index.shape) - 1:
        return None
    if any(part.shape[-1] != 1 for part in op.operands):
        return None
    part = op.operands[component]
    return next((dim for dim in range(len(part.shape) - 1) if part.shape[dim] > 1 and _counts(part, dim)), None)


def _counts(value: Value, dim: int) -> bool:
    """Whether a value is its own position along a dimension."""
    while (op := value.op) is not None:
        if op.name == "iota":
            return op.params["dimension"] == dim
        step = _behind(op, dim)
        if step is None:
            return False
        value, dim = step
    return False


def _behind(op: Op, dim: int) -> tuple[Value, int] | None:
    """The operand and its dimension that an operation on layout passes on."""
    value = op.operands[0] if op.operands else None
    if value is None:
        return None
    if op.name in ("convert_element_type", "copy"):
        return value, dim
    if op.name == "broadcast_in_dim":
        source = [i for i, d in enumerate(op.params["broadcast_dimensions"]) if d == dim]
        return (value, source[0]) if source and value.shape[source[0]] == op.result.shape[dim] else None
    if op.name in ("reshape", "squeeze", "expand_dims"):
        for before, after in dimension_groups(value.shape, op.result.shape):
            same = [i for i in before if value.shape[i] > 1]
            if dim in after and len(same) == 1 and value.shape[same[0]] == op.result.shape[dim]:
                return value, same[0]
        return None
    if op.name == "select_n" and _is_below_zero(op.operands[0], op.operands[1]):
        return op.operands[1], dim  # indices below zero count from the end; positions never are
    return None


def _is_below_zero(test: Value, value: Value) -> bool:
    op = test.op
    if op is None or op.name != "lt" or op.operands[0] is not value:
        return False
    zero = op.operands[1].const
    return zero is not None and np.size(zero) == 1 and not np.any(zero)
