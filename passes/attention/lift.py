"""Pulls a mask or a bias back to a function of indices, leaving only run-time arrays that are no such function.

Matches: elementwise operations, iotas, constants, layout operations, slices, reversals. Anything else ends in a leaf:
the array itself, read at the indices of its own axes. The one idea: every dimension of a value is given the expression
of the index it is read at, so that a slice is a shift and a reshape is a division.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import lax

from passes.attention.constants import index_form
from passes.attention.expression import Apply, Constant, Expression, Index, Leaf, Role, walk
from passes.axes import Axes, Axis, View, size_of
from passes.graph import Op, Value
from passes.incremental.rules.pointwise import POINTWISE

Position = tuple[Axis, ...] | Expression
"""Where a dimension is read: at the index of its own axes, or at an expression."""


class NotLiftable(Exception):
    """A value depends on what is neither an index nor an array over the axes of the scores."""


@dataclass(frozen=True)
class Roles:
    """The axes of each role, outermost first. Invariant: no axis has two roles."""

    axes: Axes
    of: Mapping[Role, tuple[Axis, ...]]

    def role(self, axis: Axis) -> Role | None:
        """The role of an axis."""
        return next((role for role, axes in self.of.items() if axis in axes), None)


@dataclass
class Lifting:
    """One lifting: its leaves, in the order of their numbers, each with the axes of its dimensions."""

    roles: Roles
    leaves: list[View] = field(default_factory=list)
    _memo: dict[Any, Expression] = field(default_factory=dict)

    def lift(self, view: View) -> Expression:
        """The expression of a value.

        Raises:
          NotLiftable: it is no function of indices and leaves.
        """
        dims = tuple(self.roles.axes.expand(dim) for dim in view.dims)
        return self._lift(view.value, dims)

    def _lift(self, value: Value, at: tuple[Position, ...]) -> Expression:
        key = (value, at)
        if key not in self._memo:
            num_leaves = len(self.leaves)
            try:
                self._memo[key] = self._behind(value, at)
            except NotLiftable:
                del self.leaves[num_leaves:]
                self._memo = {k: e for k, e in self._memo.items() if not _beyond(e, num_leaves)}
                self._memo[key] = self._leaf(value, at)
        return self._memo[key]

    def _behind(self, value: Value, at: tuple[Position, ...]) -> Expression:
        if isinstance(value.const, np.ndarray):
            return self._constant(value, at)
        op = value.op
        if op is None or len(op.results) != 1 or op.regions or op.effects:
            return self._leaf(value, at)
        if op.name in POINTWISE:
            return self._pointwise(op, at)
        places = _MOVEMENTS.get(op.name)
        if op.name == "iota":
            return self._index(at[op.params["dimension"]], str(value.dtype))
        if places is None:
            return self._leaf(value, at)
        return self._lift(op.operands[0], places(self, op, at))

    def _pointwise(self, op: Op, at: tuple[Position, ...]) -> Expression:
        operands = []
        for operand in op.operands:
            inner = (
                tuple(p if size > 1 else () for p, size in zip(at, operand.shape, strict=True)) if operand.shape else ()
            )
            operands.append(self._lift(operand, inner))
        return Apply(op.primitive, hashable(op.params), tuple(operands))

    def _constant(self, value: Value, at: tuple[Position, ...]) -> Expression:
        const = value.const
        if const.size == 0:
            raise NotLiftable("an empty constant")
        first = const.reshape(-1)[0]
        if const.size == 1 or np.array_equal(const, np.broadcast_to(first, const.shape)):
            return Constant(first.item() if const.dtype.kind in "biuf" else float(first), str(const.dtype))
        try:
            indices = [self._index(p, "int32") if size > 1 else None for p, size in zip(at, const.shape, strict=True)]
        except NotLiftable:
            return self._leaf(value, at)
        return index_form(const, indices) or self._leaf(value, at)

    def _index(self, position: Position, dtype: str) -> Expression:
        """The number that a position is."""
        if isinstance(position, Expression):
            return cast(position, dtype)
        if not position:
            return Constant(0, dtype)
        role = self.roles.role(position[0])
        if role is None:
            raise NotLiftable("an index along an axis that is none of the scores'")
        axes = self.roles.of[role]
        start = axes.index(position[0])
        if axes[start : start + len(position)] != tuple(position):
            raise NotLiftable("an index along axes that do not lie together")
        inner = int(np.prod([a.size for a in axes[start + len(position) :]], dtype=np.int64))
        size = int(np.prod([a.size for a in position], dtype=np.int64))
        index: Expression = Index(role, dtype)
        if inner > 1:
            index = Apply(lax.div_p, (), (index, Constant(inner, dtype)))
        return index if start == 0 else Apply(lax.rem_p, (), (index, Constant(size, dtype)))

    def _leaf(self, value: Value, at: tuple[Position, ...]) -> Expression:
        roles: list[Role] = []
        for position, size in zip(at, value.shape, strict=True):
            if isinstance(position, Expression):
                raise NotLiftable("an array that is read at computed places")
            for axis in position:
                role = self.roles.role(axis)
                if role is None:
                    raise NotLiftable("an array along an axis that is none of the scores'")
                if role not in roles:
                    roles.append(role)
            if size_of(position) != size:
                raise NotLiftable("an array of which a part is read")
        view = View(value, tuple(p for p in at if not isinstance(p, Expression)))
        for number, leaf in enumerate(self.leaves):
            if leaf == view:
                return Leaf(number, tuple(roles), str(value.dtype))
        self.leaves.append(view)
        return Leaf(len(self.leaves) - 1, tuple(roles), str(value.dtype))


def cast(expression: Expression, dtype: str) -> Expression:
    """An expression as another dtype."""
    params = (("new_dtype", np.dtype(dtype)), ("sharding", None), ("weak_type", False))
    return Apply(lax.convert_element_type_p, params, (expression,))


def shifted(lifting: Lifting, position: Position, offset: int) -> Position:
    """A position further along by a number."""
    if offset == 0:
        return position
    return Apply(lax.add_p, (), (lifting._index(position, "int32"), Constant(offset, "int32")))


def _transpose(lifting: Lifting, op: Op, at: tuple[Position, ...]) -> tuple[Position, ...]:
    out: list[Position] = [()] * len(at)
    for position, origin in zip(at, op.params["permutation"], strict=True):
        out[origin] = position
    return tuple(out)


def _broadcast(lifting: Lifting, op: Op, at: tuple[Position, ...]) -> tuple[Position, ...]:
    inner = op.operands[0]
    return tuple(at[d] if inner.shape[i] > 1 else () for i, d in enumerate(op.params["broadcast_dimensions"]))


def _reshape(lifting: Lifting, op: Op, at: tuple[Position, ...]) -> tuple[Position, ...]:
    inner = op.operands[0].shape
    kept = [p for p, size in zip(at, op.result.shape, strict=True) if size > 1]
    if [s for s in inner if s > 1] == [s for s in op.result.shape if s > 1]:
        rest = iter(kept)
        return tuple(next(rest) if size > 1 else () for size in inner)
    if any(isinstance(position, Expression) for position in at):
        raise NotLiftable("a reshape of computed places")
    axes = [axis for position in at if not isinstance(position, Expression) for axis in position]
    found = lifting.roles.axes.regroup(axes, inner)
    if found is None or found[1].known != lifting.roles.axes.known:
        raise NotLiftable("a reshape that cuts an axis")
    return found[0]


def _slice(lifting: Lifting, op: Op, at: tuple[Position, ...]) -> tuple[Position, ...]:
    if any(stride != 1 for stride in op.params["strides"] or ()):
        raise NotLiftable("a slice with strides")
    sizes = zip(op.operands[0].shape, op.result.shape, op.params["start_indices"], at, strict=True)
    return tuple(p if full == size else shifted(lifting, p, start) for full, size, start, p in sizes)


def _reverse(lifting: Lifting, op: Op, at: tuple[Position, ...]) -> tuple[Position, ...]:
    out = list(at)
    for d in op.params["dimensions"]:
        last = Constant(op.result.shape[d] - 1, "int32")
        out[d] = Apply(lax.sub_p, (), (last, lifting._index(at[d], "int32")))
    return tuple(out)


def _same(lifting: Lifting, op: Op, at: tuple[Position, ...]) -> tuple[Position, ...]:
    return at


_MOVEMENTS = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "slice": _slice,
    "rev": _reverse,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "optimization_barrier": _same,
}


def hashable(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    items = tuple(sorted(params.items(), key=lambda item: item[0]))
    try:
        hash(items)
    except TypeError as error:
        raise NotLiftable("an operation whose parameters cannot be compared") from error
    return items


def _beyond(expression: Expression, num_leaves: int) -> bool:
    return any(isinstance(node, Leaf) and node.number >= num_leaves for node in walk(expression))
