"""Looks through transposes, reshapes and casts to the weight that an operation reads, and follows its dimensions there.

Knows no scheme. The one idea: a dimension is an ordered product of *factors*; views reorder, split and merge them, and
each factor keeps the role (contracted, free ...) that the reading operation gave it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from passes import compat
from passes.graph import Op, Value
from passes.quantization.scopes import Scope
from passes.regions import Role


class Part(enum.Enum):
    """What a dimension of a weight is to the operation that reads it."""

    LAYER = "layer"  # a loop takes one entry each time
    BATCH = "batch"
    FREE = "free"
    CONTRACTED = "contracted"


class Factor:
    """A dimension, or part of one; identity is the object."""

    __slots__ = ("part", "size")

    def __init__(self, size: int, part: Part):
        self.size, self.part = size, part


Dims = list[list[Factor]]


@dataclass(eq=False)
class View:
    """A weight as an operation sees it, and as it is.

    Attributes:
      root: What the operand is a view of, in `scope`.
      dims: The factors of each dimension of the root.
      operand_dims: The same factors as they make up the dimensions of the operand.
      layers: The factors that loops take apart, outermost loop first.
      path: The bodies between the root and the operation, outermost first, each with whether its loop scans the weight.
    """

    root: Value
    scope: Scope
    dims: Dims
    operand_dims: Dims
    layers: Dims = field(default_factory=list)
    path: list[tuple[Scope, bool]] = field(default_factory=list)


def look_through(scope: Scope, operand: Value, parts: Sequence[Part]) -> View:
    """Follows an operand back as far as only views lie between.

    Args:
      parts: The part of each dimension of the operand.
    """
    dims = [[Factor(size, part)] if size != 1 else [] for size, part in zip(operand.shape, parts, strict=True)]
    view = View(operand, scope, dims, [list(factors) for factors in dims])
    while _step(view):
        pass
    return view


def _step(view: View) -> bool:
    """One view further back; False where there is none."""
    op = view.root.op
    if op is not None:
        dims = _dims_before(op, view)
        if dims is None:
            return False
        view.root, view.dims = op.operands[0], dims
        return True
    slot = (view.scope.slots or {}).get(view.root)
    if slot is None or view.scope.parent is None or slot.role not in (Role.CONST, Role.COND_CONST, Role.SCANNED):
        return False
    is_scanned = slot.role is Role.SCANNED
    if is_scanned:
        layer = Factor(slot.operand.shape[0], Part.LAYER)
        view.dims, view.layers = [[layer], *view.dims], [[layer], *view.layers]
    view.path.insert(0, (view.scope, is_scanned))
    view.root, view.scope = slot.operand, view.scope.parent
    return True


def _dims_before(op: Op, view: View) -> Dims | None:
    """The factors of the operand of a view; None where `op` is no view."""
    dims, params = view.dims, op.params
    if op.name in ("copy", "copy_p", "stop_gradient", "name"):
        return dims
    if op.name == "convert_element_type":
        return dims if is_float(op.operands[0]) and is_float(op.result) else None
    if op.name == "transpose":
        return [dims[params["permutation"].index(i)] for i in range(len(dims))]
    if op.name == "squeeze":
        rest = iter(dims)
        axes = {d % op.operands[0].aval.ndim for d in params["dimensions"]}
        return [[] if i in axes else next(rest) for i in range(op.operands[0].aval.ndim)]
    if op.name == "reshape":
        return _split(op.operands[0].shape, view)
    if op.name == "broadcast_in_dim":
        operand = op.operands[0]
        if operand.size != op.result.size:
            return None
        return [dims[d] for d in params["broadcast_dimensions"]]
    return None


def _split(shape: Sequence[int], view: View) -> Dims | None:
    """The factors of a reshape's operand; a factor that straddles two dimensions is split, in the operand's too."""
    rest, out = [factor for factors in view.dims for factor in factors], []
    for size in shape:
        mine: list[Factor] = []
        while size > 1:
            factor = rest.pop(0)
            if size % factor.size == 0:
                mine.append(factor)
                size //= factor.size
            elif factor.size % size == 0:
                first, second = Factor(size, factor.part), Factor(factor.size // size, factor.part)
                for dims in (view.operand_dims, view.dims, view.layers):
                    _replace(dims, factor, [first, second])
                _replace(out, factor, [first, second])
                mine.append(first)
                rest.insert(0, second)
                size = 1
            else:
                return None
        out.append(mine)
    return out


def _replace(dims: Dims, old: Factor, new: list[Factor]) -> None:
    for factors in dims:
        if old in factors:
            at = factors.index(old)
            factors[at : at + 1] = new


def is_float(value: Value) -> bool:
    """Whether a value holds floats of 16 bits or more; smaller ones are somebody else's quantization."""
    dtype = value.dtype
    return not compat.is_extended_dtype(dtype) and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 2


# ------------------------------------------------------------------------------------ the canonical form of a weight
@dataclass(frozen=True)
class Canonical:
    """How a root becomes `[*layers, *batch, O, K]`: contracted factors last, free ones before, in the root's order.

    Attributes:
      sizes: The root reshaped, neighbours of one part merged.
      order: The transpose that follows.
      shape: The result.
      num_layers: Leading dimensions that loops take apart.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    num_layers: int

    def __call__(self, root: Any) -> Any:
        return root.reshape(self.sizes).transpose(self.order).reshape(self.shape)


def canonical_form(view: View, batch: Sequence[int]) -> Canonical:
    """The canonical form of a viewed weight.

    Args:
      batch: The batch dimensions of the operand, in order.
    """
    merged: list[list[Factor]] = []
    for factors in view.dims:
        previous = None
        for factor in factors:
            if previous is not None and factor.part is previous.part and factor.part in (Part.FREE, Part.CONTRACTED):
                merged[-1].append(factor)
            else:
                merged.append([factor])
            previous = factor
    leading = [factor for factors in view.layers for factor in factors]
    leading += [factor for d in batch for factor in view.operand_dims[d]]

    def rank(index: int) -> tuple[int, int]:
        first = merged[index][0]
        if first.part in (Part.LAYER, Part.BATCH):
            return 0, leading.index(first)
        return (1 if first.part is Part.FREE else 2), index

    shape = (
        *map(_size, view.layers),
        *(_size(view.operand_dims[d]) for d in batch),
        _size(in_root_order(view, Part.FREE)),
        _size(in_root_order(view, Part.CONTRACTED)),
    )
    order = sorted(range(len(merged)), key=rank)
    return Canonical(tuple(map(_size, merged)), tuple(order), shape, len(view.layers))


def in_root_order(view: View, part: Part) -> list[Factor]:
    """The factors of one part, as the root has them."""
    return [factor for factors in view.dims for factor in factors if factor.part is part]


def _size(factors: Iterable[Factor]) -> int:
    return math.prod(factor.size for factor in factors)
