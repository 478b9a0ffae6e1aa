"""Constant arrays that are functions of their indices: triangles, bands, prefixes, counts, and two numbers by these.

A mask that was made outside the traced function is an array in the program; told by its rule it is a few nodes. The one
idea: the rule is tried on the whole array, so it is right wherever the array has elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from passes.attention.expression import Apply, Constant, Expression

_MAX_INTERVALS = 4
_MAX_PREFIX = 64


def index_form(array: np.ndarray, indices: Sequence[Expression | None]) -> Expression | None:
    """The rule of an array, or None.

    Args:
      indices: For each dimension the i32 expression it is read at; None for a size of 1.
    """
    wide = [(i, e) for i, e in enumerate(indices) if array.shape[i] > 1]
    if not 1 <= len(wide) <= 2 or any(e is None for _, e in wide):
        return None
    places = [e for _, e in wide if e is not None]
    array = array.reshape([array.shape[i] for i, _ in wide])
    if array.dtype == bool:
        return _predicate(array, places)
    if array.dtype.kind not in "iuf":
        return None
    values = np.unique(array)
    if len(values) == 2 and not np.isnan(values).any():
        high = _predicate(array == values[1], places)
        low_and_high = tuple(Constant(v.item(), str(array.dtype)) for v in values)
        return None if high is None else Apply(lax.select_n_p, (), (high, *low_and_high))
    return _count(array, places[0]) if array.ndim == 1 and array.dtype.kind in "iu" else None


def _count(array: np.ndarray, index: Expression) -> Expression | None:
    """`first + step * i`."""
    whole = array.astype(np.int64)
    first, step = int(whole[0]), int(whole[1] - whole[0])
    if not np.array_equal(whole, first + step * np.arange(len(whole))):
        return None
    scaled = _int("mul", index, step) if step != 1 else index
    shifted = _int("add", scaled, first) if first else scaled
    params = (("new_dtype", array.dtype), ("sharding", None), ("weak_type", False))
    return shifted if array.dtype == np.int32 else Apply(lax.convert_element_type_p, params, (shifted,))


def _predicate(seen: np.ndarray, places: Sequence[Expression]) -> Expression | None:
    if seen.ndim == 1:
        return _union(seen, 0, places[0])
    row, column = places
    if (seen == seen[:1]).all():
        return _union(seen[0], 0, column)
    if (seen == seen[:, :1]).all():
        return _union(seen[:, 0], 0, row)
    return _band(seen, row, column) or _split(seen, row, column)


def _band(seen: np.ndarray, row: Expression, column: Expression) -> Expression | None:
    """A rule of the difference of both indices."""
    held = _by_difference(seen)
    return None if held is None else _union(held, 1 - seen.shape[1], Apply(lax.sub_p, (), (row, column)))


def _by_difference(seen: np.ndarray) -> np.ndarray | None:
    """For each difference, from the lowest, whether it is seen; None where that depends on the place."""
    rows, columns = seen.shape
    difference = np.arange(rows)[:, None] - np.arange(columns) + columns - 1
    total = np.bincount(difference.ravel(), minlength=rows + columns - 1)
    held = np.bincount(difference[seen], minlength=rows + columns - 1)
    return held == total if ((held == 0) | (held == total)).all() else None


def _split(seen: np.ndarray, row: Expression, column: Expression) -> Expression | None:
    """One rule for the first keys and one for the others: attention sinks, a prefix."""
    for prefix in range(1, min(seen.shape[1], _MAX_PREFIX)):
        left, right = seen[:, :prefix], _by_difference(seen[:, prefix:])
        if right is None:
            continue
        first = Constant(True, "bool") if left.all() else _predicate_of(left, row, column)
        shifted = _int("sub", column, prefix)
        others = _union(right, 1 - (seen.shape[1] - prefix), Apply(lax.sub_p, (), (row, shifted)))
        if first is None or others is None:
            continue
        early = _int("lt", column, prefix)
        return _or(_and(early, first), _and(Apply(lax.not_p, (), (early,)), others))
    return None


def _predicate_of(seen: np.ndarray, row: Expression, column: Expression) -> Expression | None:
    if not seen.any():
        return Constant(False, "bool")
    return _predicate(seen, (row, column)) if seen.shape[1] > 1 else _union(seen[:, 0], 0, row)


def _union(held: np.ndarray, first: int, number: Expression) -> Expression | None:
    """That a number, the first of whose values is `first`, is one of those held: some intervals, open at the ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], held, [False]]).astype(np.int8)))
    intervals = edges.reshape(-1, 2)
    if len(intervals) > _MAX_INTERVALS:
        return None
    out: Expression | None = None
    for start, end in intervals.tolist():
        part: Expression = Constant(True, "bool")
        if start > 0:
            part = _int("ge", number, first + start)
        if end < len(held):
            part = _and(part, _int("lt", number, first + end))
        out = part if out is None else _or(out, part)
    return Constant(False, "bool") if out is None else out


_INT = {"add": lax.add_p, "sub": lax.sub_p, "mul": lax.mul_p, "lt": lax.lt_p, "ge": lax.ge_p}


def _int(name: str, left: Expression, right: int) -> Expression:
    primitive: Any = _INT[name]
    return Apply(primitive, (), (left, Constant(right, "int32")))


def _and(first: Expression, second: Expression) -> Expression:
    if isinstance(first, Constant):
        return second if first.value else first
    if isinstance(second, Constant):
        return first if second.value else second
    return Apply(lax.and_p, (), (first, second))


def _or(first: Expression, second: Expression) -> Expression:
    if isinstance(first, Constant):
        return first if first.value else second
    if isinstance(second, Constant):
        return second if second.value else first
    return Apply(lax.or_p, (), (first, second))
