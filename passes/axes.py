"""Axes that can be told apart, split and found equal: what makes a match depend on roles instead of layouts.

Every dimension of a value is a product of *axes*, outermost first (none for size 1). A transpose permutes them, a
reshape regroups them and splits one where it must, a broadcast adds new ones. Looking at two occurrences of a value
says that their axes are equal. So `[B, T, N * H]`, `[B, N, T, H]` and `[B, T, K, G, H]` name the same axes, and a
softmax over queries cannot pass for one over keys.

Knows no pattern and rewrites nothing. The one idea: a substitution maps an axis to the axes it was found to be, and is
never changed in place, so that a search can go back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from passes import compat
from passes.graph import Op, Value

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis, told apart by identity. Invariant: `size > 1`."""

    size: int
    number: int = field(default_factory=lambda: next(_numbers))

    def __repr__(self) -> str:
        return f"a{self.number}:{self.size}"


Dims = tuple[tuple[Axis, ...], ...]
"""For each dimension of a value the axes it is made of, outermost first."""


def fresh(shape: Sequence[int]) -> Dims:
    """New axes for a shape."""
    return tuple((Axis(size),) if size > 1 else () for size in shape)


@dataclass(frozen=True)
class Axes:
    """What is known of axes. Every method that learns something returns another `Axes`, or None for a contradiction."""

    known: Mapping[Axis, tuple[Axis, ...]] = field(default_factory=dict)

    def expand(self, axes: Sequence[Axis]) -> tuple[Axis, ...]:
        """The axes these were found to be, none of which is known to be another or several."""
        out: list[Axis] = []
        for axis in axes:
            out.extend(self.expand(self.known[axis]) if axis in self.known else (axis,))
        return tuple(out)

    def flat(self, dims: Dims) -> tuple[Axis, ...]:
        """All axes of a value, outermost first."""
        return self.expand([axis for dim in dims for axis in dim])

    def unify(self, first: Sequence[Axis], second: Sequence[Axis]) -> Axes | None:
        """Learns that two products of axes are the same; axes are split where their sizes say so."""
        a, b = list(self.expand(first)), list(self.expand(second))
        known = dict(self.known)
        while a and b:
            x, y = a.pop(0), b.pop(0)
            if x is y:
                continue
            if x.size == y.size:
                known[x] = (y,)
            elif x.size > y.size:
                rest = _divided(x, y)
                if rest is None:
                    return None
                known[x] = (y, rest)
                a.insert(0, rest)
            else:
                rest = _divided(y, x)
                if rest is None:
                    return None
                known[y] = (x, rest)
                b.insert(0, rest)
            a, b = list(Axes(known).expand(a)), list(Axes(known).expand(b))
        return None if a or b else Axes(known)

    def unify_dims(self, first: Dims, second: Dims) -> Axes | None:
        """Learns that two values have the same axes, dimension by dimension; a dimension of size 1 fits any."""
        axes: Axes | None = self
        for x, y in zip(first, second, strict=True):
            if x and y and axes is not None:
                axes = axes.unify(x, y)
        return axes

    def regroup(self, axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Dims, Axes] | None:
        """Divides a product of axes among the dimensions of a shape, splitting axes where a dimension ends inside."""
        left, known = list(self.expand(axes)), dict(self.known)
        dims: list[tuple[Axis, ...]] = []
        for size in shape:
            taken: list[Axis] = []
            while size > 1:
                if not left:
                    return None
                axis = left.pop(0)
                if size % axis.size:
                    if axis.size % size:
                        return None
                    outer, inner = Axis(size), Axis(axis.size // size)
                    known[axis] = (outer, inner)
                    left.insert(0, inner)
                    axis = outer
                taken.append(axis)
                size //= axis.size
            dims.append(tuple(taken))
        return (tuple(dims), Axes(known)) if not left else None


def _divided(large: Axis, small: Axis) -> Axis | None:
    """What is left of an axis once its outer part is taken away."""
    return Axis(large.size // small.size) if large.size % small.size == 0 else None


@dataclass(frozen=True)
class View:
    """A value seen through layout operations: each of its dimensions in the axes of the place it was seen from."""

    value: Value
    dims: Dims


def look_through(view: View, axes: Axes, *, casts: bool = True, stops: bool = True) -> tuple[View, Axes]:
    """The value behind transposes, reshapes, broadcasts, copies and float casts.

    Args:
      casts: Whether casts between float dtypes are looked through.
      stops: Whether `stop_gradient` is: what is the same value may have another gradient.
    """
    while (step := _behind(view, axes, casts, stops)) is not None:
        view, axes = step
    return view, axes


def _behind(view: View, axes: Axes, casts: bool, stops: bool) -> tuple[View, Axes] | None:
    op = view.value.op
    if op is None or len(op.results) != 1:
        return None
    if op.name == "transpose":
        source: list[tuple[Axis, ...]] = [()] * len(view.dims)
        for dim, origin in zip(view.dims, op.params["permutation"], strict=True):
            source[origin] = dim
        return View(op.operands[0], tuple(source)), axes
    if op.name == "broadcast_in_dim":
        inner = op.operands[0]
        places = op.params["broadcast_dimensions"]
        dims = tuple(
            view.dims[place] if inner.shape[i] == view.value.shape[place] else () for i, place in enumerate(places)
        )
        return View(inner, dims), axes
    if op.name in ("reshape", "squeeze", "expand_dims"):
        if any(not dim and size > 1 for dim, size in zip(view.dims, view.value.shape, strict=True)):
            return None
        found = axes.regroup(axes.flat(view.dims), op.operands[0].shape)
        return None if found is None else (View(op.operands[0], found[0]), found[1])
    if (
        op.name in ("copy", "copy_p", "optimization_barrier", "reduce_precision")
        or stops
        and op.name == "stop_gradient"
    ):
        return View(op.operands[0], view.dims), axes
    if op.name == "convert_element_type" and casts and _is_float_cast(op):
        return View(op.operands[0], view.dims), axes
    return None


def _is_float_cast(op: Op) -> bool:
    return compat.is_inexact(op.operands[0].dtype) and compat.is_inexact(op.result.dtype)


def operand_views(op: Op, dims: Dims) -> list[View]:
    """The operands of an elementwise operation in the axes of its result; a size-1 dimension of one has no axes."""
    return [View(operand, _fitted(operand, dims)) for operand in op.operands]


def _fitted(operand: Value, dims: Dims) -> Dims:
    if not operand.shape:
        return ()
    return tuple(dim if size > 1 else () for dim, size in zip(dims, operand.shape, strict=True))


def contraction_views(op: Op, dims: Dims) -> tuple[View, View, tuple[Axis, ...]]:
    """The operands of a `dot_general` in the axes of its result and new ones for what is contracted.

    Returns: Both views, and the contracted axes.
    """
    (contract, batch) = op.params["dimension_numbers"]
    sides: list[dict[int, tuple[Axis, ...]]] = [{}, {}]
    num_batch = len(batch[0])
    for position in range(num_batch):
        for side in (0, 1):
            sides[side][batch[side][position]] = dims[position]
    contracted = fresh([op.operands[0].shape[i] for i in contract[0]])
    for side in (0, 1):
        sides[side].update(zip(contract[side], contracted, strict=True))
    rest = iter(dims[num_batch:])
    for side in (0, 1):
        for i in range(len(op.operands[side].shape)):
            if i not in sides[side]:
                sides[side][i] = next(rest)
    views = [View(v, tuple(sides[i][j] for j in range(len(v.shape)))) for i, v in enumerate(op.operands)]
    return views[0], views[1], tuple(axis for dim in contracted for axis in dim)


def reduction_view(op: Op, dims: Dims) -> tuple[View, tuple[Axis, ...]]:
    """The operand of a reduction in the axes of its result and new ones for what is reduced, and these."""
    operand, reduced = op.operands[0], tuple(op.params["axes"])
    rest, new = iter(dims), iter(fresh([operand.shape[i] for i in reduced]))
    by_dim = {i: next(new) for i in reduced}
    out = tuple(by_dim[i] if i in by_dim else next(rest) for i in range(len(operand.shape)))
    return View(operand, out), tuple(axis for dim in (by_dim[i] for i in reduced) for axis in dim)


def scalar_of(value: Value) -> float | None:
    """The number that every element of a value is known to be, seen through broadcasts and casts; else None."""
    view, _ = look_through(View(value, fresh(value.shape)), Axes())
    const = view.value.const
    if (
        not isinstance(const, np.ndarray)
        or const.size == 0
        or not (compat.is_inexact(const.dtype) or const.dtype.kind in "iub")
    ):
        return None
    first = const.reshape(-1)[0]
    if const.size > 1 and not np.array_equal(const, np.broadcast_to(first, const.shape)):
        return None
    return float(first)


def size_of(axes: Sequence[Axis]) -> int:
    """Number of elements along a product of axes."""
    return int(np.prod([axis.size for axis in axes], dtype=np.int64))
