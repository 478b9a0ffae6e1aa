"""One quantized product or look-up by itself, before and after, to be validated.

Knows no program. The one idea: the number of rows has no part in how a weight is quantized, so an instance has two a
dimension whatever the program has, and one verdict holds for all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from passes.extract import clone
from passes.graph import Graph, Op
from passes.reader import trace

_NUM_ROWS = 2


def make_instance(op: Op, weight: int, rewrite: Callable[[Graph], object]) -> tuple[Graph, Graph]:
    """The operation on inputs of its own, before and after `rewrite`, which finds the weight as parameter `weight`.

    Args:
      weight: Which operand is the weight.
    """
    operands = list(op.operands)
    shapes = [list(v.shape) for v in operands]
    for d in _rows(op, weight):
        shapes[1 - weight][d] = _NUM_ROWS
    types = [jax.ShapeDtypeStruct(tuple(s), v.dtype) for s, v in zip(shapes, operands, strict=True)]
    before, _ = trace(_function(op), *types)
    before.inputs[weight].path = "weight"
    after = clone(before)
    rewrite(after)
    return before, after


def _rows(op: Op, weight: int) -> Sequence[int]:
    """Dimensions of the other operand that only count rows."""
    rank = op.operands[1 - weight].aval.ndim
    if op.name == "gather":
        return range(rank - 1)
    contracted, batch = (sides[1 - weight] for sides in op.params["dimension_numbers"])
    return [d for d in range(rank) if d not in contracted and d not in batch]


def _function(op: Op) -> Callable[..., Any]:
    p = op.params
    if op.name == "gather":
        return lambda table, indices: lax.gather(
            table,
            indices,
            p["dimension_numbers"],
            p["slice_sizes"],
            unique_indices=p["unique_indices"],
            indices_are_sorted=p["indices_are_sorted"],
            mode=p["mode"],
            fill_value=p["fill_value"],
        )
    return lambda x, y: lax.dot_general(
        x,
        y,
        p["dimension_numbers"],
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
