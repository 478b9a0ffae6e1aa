"""Makes a pair of graphs smaller together, so that a rewrite of a large model can be tried in a fraction of a second.

The one idea: dimensions that must stay equal form a class (found by walking both graphs, whose inputs and outputs
correspond), and a class is made smaller as a whole. A class is left alone where an operation pins it (a partial slice,
a concatenation, a reshape that merges it, a body of a loop) and, when something is summed over it, where a constant may
stand for its size. What comes out is verified, so that a rule forgotten here costs a refusal and never a wrong pair.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from passes import compat
from passes.extract import clone
from passes.graph import Graph, Op, Value
from passes.incremental.rules.pointwise import POINTWISE
from passes.verify import MalformedGraph, verify

Dim = tuple[Value, int]

LEAST = 8
"""Sizes that are not made smaller."""


class CannotShrink(ValueError):
    """The pair stays too large; the message says why."""


def shrink(before: Graph, after: Graph, is_small: Callable[[Graph, Graph], bool]) -> tuple[Graph, Graph]:
    """Copies of two graphs with some dimensions halved until `is_small` holds.

    Args:
      before, after: Graphs of JAX's own operations, with inputs and outputs of the same shapes.

    Raises:
      CannotShrink: no dimension that may be made smaller is left.
    """
    classes = _Classes()
    for graph in (before, after):
        for op in graph.ops:
            _relate(op, classes)
    for pairs in (zip(before.inputs, after.inputs, strict=True), zip(before.outputs, after.outputs, strict=True)):
        for a, b in pairs:
            classes.join_values(a, b)
    candidates = classes.candidates(_scalars(before) | _scalars(after))
    least = {dim: min(LEAST, classes.size(dim)) for dim in candidates}
    if not is_small(_resized(before, classes, least), _resized(after, classes, least)):
        raise CannotShrink("the rewrite is large in dimensions that cannot be made smaller")
    sizes: dict[Dim, int] = {}
    pair = before, after
    for dim in candidates:
        size = classes.size(dim)
        while size > LEAST and not is_small(*pair):
            size = max(LEAST, size // 2)
            sizes[dim] = size
            pair = _resized(before, classes, sizes), _resized(after, classes, sizes)
    for graph in pair:
        _check(graph)
    return pair


class _Classes:
    """Dimensions that are equal, by union and find."""

    def __init__(self) -> None:
        self._parents: dict[Dim, Dim] = {}
        self._pinned: set[Dim] = set()
        self._reduced: set[Dim] = set()

    def find(self, dim: Dim) -> Dim:
        while (parent := self._parents.setdefault(dim, dim)) != dim:
            self._parents[dim] = self._parents[parent]
            dim = self._parents[dim]
        return dim

    def join(self, a: Dim, b: Dim) -> None:
        if self.size(a) != self.size(b):
            raise CannotShrink(f"dimensions of {self.size(a)} and {self.size(b)} would have to be equal")
        self._parents[self.find(a)] = self.find(b)

    def join_values(self, a: Value, b: Value) -> None:
        for d in range(len(a.shape)):
            self.join((a, d), (b, d))

    def pin(self, *values: Value) -> None:
        self._pinned.update((value, d) for value in values for d in range(len(value.shape)))

    def pin_dim(self, dim: Dim) -> None:
        self._pinned.add(dim)

    def reduce(self, dim: Dim) -> None:
        self._reduced.add(dim)

    def size(self, dim: Dim) -> int:
        return dim[0].shape[dim[1]]

    def candidates(self, scalars: set[float]) -> list[Dim]:
        """One dimension of each class that may shrink: those nothing is summed over first, then the largest."""
        members: dict[Dim, list[Dim]] = defaultdict(list)
        for dim in list(self._parents):
            members[self.find(dim)].append(dim)
        pinned = {self.find(dim) for dim in self._pinned}
        reduced = {self.find(dim) for dim in self._reduced}
        free = [
            root
            for root in members
            if root not in pinned and not (root in reduced and _is_size(self.size(root), scalars))
        ]
        return sorted(free, key=lambda root: (root in reduced, -self.size(root)))


def _is_size(size: int, scalars: set[float]) -> bool:
    """Whether one of the constants may come from this size: a mean's divisor, a softmax's scale."""
    kin = [size, 1 / size, math.sqrt(size), 1 / math.sqrt(size), size - 1, 1 / (size - 1) if size > 1 else 1]
    return any(math.isclose(abs(x), k, rel_tol=1e-2) for x in scalars for k in kin)


def _scalars(graph: Graph) -> set[float]:
    consts = [v.const for _, op in graph.walk() for v in op.operands if isinstance(v.const, np.ndarray)]
    return {float(x.reshape(-1)[0].astype(np.float64)) for x in consts if x.size == 1 and x.dtype.kind != "c"}


# ------------------------------------------------------------------------------------- which dimensions are equal
def _relate(op: Op, classes: _Classes) -> None:
    rule = _RULES.get(op.name)
    if op.name in POINTWISE:
        rule = _pointwise
    elif op.name.startswith("reduce_") or op.name in ("argmax", "argmin"):
        rule = _reduction
    if rule is None or op.regions:
        classes.pin(*op.operands, *op.results)
    else:
        rule(op, classes)
    for value in (*op.operands, *op.results):  # a value that no rule speaks of is known, and free
        for d in range(len(value.shape)):
            classes.find((value, d))


def _pointwise(op: Op, classes: _Classes) -> None:
    for operand in op.operands:
        if len(operand.shape) == len(op.result.shape):
            for d, size in enumerate(operand.shape):
                if size == op.result.shape[d]:
                    classes.join((operand, d), (op.result, d))
        elif operand.shape:
            classes.pin(operand, op.result)


def _reduction(op: Op, classes: _Classes) -> None:
    axes = set(op.params["axes"])
    for axis in axes:
        classes.reduce((op.operands[0], axis))
    kept = [d for d in range(len(op.operands[0].shape)) if d not in axes]
    for d, old in enumerate(kept):
        classes.join((op.result, d), (op.operands[0], old))


def _dot_general(op: Op, classes: _Classes) -> None:
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = op.params["dimension_numbers"]
    lhs, rhs = op.operands
    for a, b in zip(lhs_contracted, rhs_contracted, strict=True):
        classes.join((lhs, a), (rhs, b))
        classes.reduce((lhs, a))
    for a, b in zip(lhs_batch, rhs_batch, strict=True):
        classes.join((lhs, a), (rhs, b))
    made = [(lhs, d) for d in lhs_batch]
    made += [(lhs, d) for d in range(len(lhs.shape)) if d not in (*lhs_contracted, *lhs_batch)]
    made += [(rhs, d) for d in range(len(rhs.shape)) if d not in (*rhs_contracted, *rhs_batch)]
    for d, source in enumerate(made):
        classes.join((op.result, d), source)


def _broadcast_in_dim(op: Op, classes: _Classes) -> None:
    for old, new in enumerate(op.params["broadcast_dimensions"]):
        if op.operands[0].shape[old] == op.result.shape[new]:
            classes.join((op.operands[0], old), (op.result, new))


def _transpose(op: Op, classes: _Classes) -> None:
    for new, old in enumerate(op.params["permutation"]):
        classes.join((op.operands[0], old), (op.result, new))


def _reshape(op: Op, classes: _Classes) -> None:
    for old, new in regroup(op.operands[0].shape, op.result.shape):
        if len(old) == len(new) == 1:
            classes.join((op.operands[0], old[0]), (op.result, new[0]))
        else:
            for value, dims in ((op.operands[0], old), (op.result, new)):
                for d in dims:
                    classes.pin_dim((value, d))


def regroup(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions, ones aside, that a reshape turns into each other.

    Both shapes hold the same number of elements, which is not zero.
    """
    left = [d for d, n in enumerate(old) if n != 1]
    right = [d for d, n in enumerate(new) if n != 1]
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        while (x := math.prod(old[d] for d in a)) != (y := math.prod(new[d] for d in b)):
            (a if x < y else b).append((left if x < y else right).pop(0))
        yield a, b


def _squeeze(op: Op, classes: _Classes) -> None:
    dropped = {d % len(op.operands[0].shape) for d in op.params["dimensions"]}
    kept = [d for d in range(len(op.operands[0].shape)) if d not in dropped]
    for new, old in enumerate(kept):
        classes.join((op.operands[0], old), (op.result, new))


def _expand_dims(op: Op, classes: _Classes) -> None:
    added = {d % len(op.result.shape) for d in op.params["dimensions"]}
    kept = [d for d in range(len(op.result.shape)) if d not in added]
    for old, new in enumerate(kept):
        classes.join((op.operands[0], old), (op.result, new))


def _slice(op: Op, classes: _Classes) -> None:
    strides = op.params["strides"] or (1,) * len(op.result.shape)
    for d, (start, stride) in enumerate(zip(op.params["start_indices"], strides, strict=True)):
        if start == 0 and stride == 1 and op.operands[0].shape[d] == op.result.shape[d]:
            classes.join((op.operands[0], d), (op.result, d))
        else:
            classes.pin_dim((op.operands[0], d))
            classes.pin_dim((op.result, d))


def _along(key: str, *, is_pinned: bool) -> Callable[[Op, _Classes], None]:
    """Operations that leave all dimensions but one to themselves."""

    def rule(op: Op, classes: _Classes) -> None:
        axis = op.params[key]
        for operand in op.operands:
            for result in op.results:
                for d in range(len(operand.shape)):
                    if d != axis:
                        classes.join((operand, d), (result, d))
                    elif is_pinned:
                        classes.pin_dim((operand, d))
                        classes.pin_dim((result, d))
                    else:
                        classes.join((operand, d), (result, d))
                        classes.reduce((operand, d))

    return rule


def _free(op: Op, classes: _Classes) -> None:
    """Results of any size."""


_RULES: dict[str, Callable[[Op, _Classes], None]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _along("dimension", is_pinned=True),
    "dot_general": _dot_general,
    "expand_dims": _expand_dims,
    "iota": _free,
    "reshape": _reshape,
    "slice": _slice,
    "split": _along("axis", is_pinned=True),
    "squeeze": _squeeze,
    "transpose": _transpose,
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis", is_pinned=False)),
}


# ------------------------------------------------------------------------------------- the same program, smaller
def _resized(graph: Graph, classes: _Classes, sizes: dict[Dim, int]) -> Graph:
    by_root = {classes.find(dim): size for dim, size in sizes.items()}

    def shape_of(value: Value) -> tuple[int, ...]:
        return tuple(by_root.get(classes.find((value, d)), n) for d, n in enumerate(value.shape))

    copies: dict[Value, Value] = {}

    def resized(value: Value) -> Value:
        if value not in copies:
            shape = shape_of(value)
            aval = value.aval if shape == value.shape else compat.shaped(shape, value.dtype)
            const = value.const
            if const is not None and shape != value.shape:
                const = np.asarray(const)[tuple(slice(0, n) for n in shape)]
            copies[value] = Value(aval, const=const)
        return copies[value]

    out = Graph([resized(v) for v in graph.inputs])
    for op in graph.ops:
        operands = [resized(v) for v in op.operands]
        shapes = [shape_of(v) for v in op.results]
        avals = [r.aval if s == r.shape else compat.shaped(s, r.dtype) for r, s in zip(op.results, shapes, strict=True)]
        regions = tuple(clone(region) for region in op.regions)
        twin = Op(op.primitive, operands, _params(op, shapes), avals, regions, op.source, op.effects)
        copies.update(zip(op.results, twin.results, strict=True))
        out.ops.append(twin)
    out.outputs = [resized(v) for v in graph.outputs]
    return out


def _check(graph: Graph) -> None:
    try:
        verify(graph)
    except MalformedGraph as error:
        raise CannotShrink(f"a smaller program is not well formed: {error}") from error


_SHAPE_PARAMS = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "iota": "shape", "slice": "limit_indices"}


def _params(op: Op, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    key = _SHAPE_PARAMS.get(op.name)
    if key is None or shapes[0] == op.result.shape:
        return op.params
    new = shapes[0]
    if op.name == "slice":  # a dimension that moved starts at zero
        old = zip(op.params["limit_indices"], op.result.shape, new, strict=True)
        new = tuple(limit if before == after else after for limit, before, after in old)
    return {**op.params, key: new}
