"""Some rows of a value, made from the same rows of what it is made of, back to what is read from a cache.

A *demand* is a value, the dimension of it that counts requests, the one that counts rows, and which rows: those at
positions known at run time, or a fixed range. The rules below say what an operation must be given to make these rows
alone; they hold for operations that keep rows apart. Where there is none, rows are taken from the whole value, unless
it is made from a cache: then all of the cache would be read, and nothing is gained.

The one idea: the rows are made for one request, as an array whose dimension of requests has size 1, and mapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from passes import compat
from passes.graph import Op, Value
from passes.incremental.rules.pointwise import POINTWISE
from passes.regions import has_roles

Fixed = tuple[int, int]
"""Rows from the first to before the second."""


class NotByRows(Exception):
    """Rows cannot be made apart; `op` is where."""

    def __init__(self, op: Op | None, reason: str):
        super().__init__(reason)
        self.op, self.reason = op, reason


@dataclass(frozen=True)
class Demand:
    """Rows of a value.

    Attributes:
      batch: The dimension of requests; None where the value is the same for all.
      rows: The dimension of rows; None for the value as it is.
      fixed: The range that is wanted; None for those at given positions.
    """

    value: Value
    batch: int | None
    rows: int | None
    fixed: Fixed | None = None

    def shape(self, num_rows: int) -> list[int]:
        """Of the rows for one request, of which `num_rows` are at given positions."""
        shape = list(self.value.shape)
        if self.batch is not None:
            shape[self.batch] = 1
        if self.rows is not None:
            shape[self.rows] = num_rows if self.fixed is None else self.fixed[1] - self.fixed[0]
        return shape


@dataclass(frozen=True)
class _Node:
    """How a demand is met: by an operation on other demands, or, without one, from the whole value."""

    op: Op | None
    operands: tuple[Demand, ...] = ()


@dataclass
class RowProgram:
    """How to make rows of some values.

    Attributes:
      reads: What is read of each cache, by the operation that reads all of it now.
    """

    nodes: dict[Demand, _Node] = field(default_factory=dict)
    reads: dict[Op, dict[Demand, None]] = field(default_factory=dict)
    _from_cache: dict[Value, bool] = field(default_factory=dict)

    @property
    def whole(self) -> list[Demand]:
        """Demands that are met from whole values."""
        return [demand for demand, node in self.nodes.items() if node.op is None]

    def add(self, demand: Demand) -> None:
        """Finds how to meet a demand.

        Raises:
          NotByRows: It takes all of a cache.
        """
        if demand in self.nodes:
            return
        op = demand.value.op
        if demand.rows is None:
            self.nodes[demand] = self._unrolled(demand)
        elif op is not None and op.name == "kv_update_read":
            self._read(op, demand)
        else:
            try:
                self.nodes[demand] = self._by_rule(demand)
            except NotByRows:
                if self._is_from_cache(demand.value):
                    raise
                self.nodes[demand] = _Node(None)

    def _read(self, op: Op, demand: Demand) -> None:
        is_batch = demand.batch == 0 or demand.value.shape[0] == 1  # of one request no dimension need be the batch's
        if demand.value.index or not is_batch or demand.rows != 1 or op.params["length"] is None:
            raise NotByRows(op, "rows of the cache are not where they are read")
        self.reads.setdefault(op, {})[demand] = None

    def _by_rule(self, demand: Demand) -> _Node:
        op = demand.value.op
        if op is None:
            raise NotByRows(None, "a value comes from outside")
        if demand.rows is not None and op.name == "iota" and op.params["dimension"] == demand.rows:
            return _Node(op)
        batch = [None] * len(op.operands) if demand.batch is None else list(_sources(op, demand.value, demand.batch))
        rows = [None] * len(op.operands) if demand.rows is None else list(_sources(op, demand.value, demand.rows))
        demands = []
        for operand, b, r in zip(op.operands, batch, rows, strict=True):
            demands.append(Demand(operand, b, r, None if r is None else demand.fixed))
        for inner in demands:
            self.add(inner)
        return _Node(op, tuple(demands))

    def _unrolled(self, demand: Demand) -> _Node:
        """A value without rows, which may still be made of some: the first row of a cache stands for unwritten ones."""
        op = demand.value.op
        if op is None or not self._is_from_cache(demand.value):
            return _Node(None)
        try:
            if op.name == "slice":
                return self._sliced(demand, op)
            if op.name in _LAYOUTS:
                return self._by_rule(demand)
        except NotByRows:
            pass
        return _Node(None)

    def _sliced(self, demand: Demand, op: Op) -> _Node:
        (operand,) = op.operands
        start, limit = op.params["start_indices"], op.params["limit_indices"]
        cut = [d for d, n in enumerate(operand.shape) if (start[d], limit[d]) != (0, n) and d != demand.batch]
        if len(cut) != 1 or op.params["strides"] is not None:
            raise NotByRows(op, "more than rows are cut")
        (rows,) = cut
        inner = Demand(operand, demand.batch, rows, (int(start[rows]), int(limit[rows])))
        self.add(inner)
        return _Node(op, (inner,))

    def _is_from_cache(self, value: Value) -> bool:
        known, stack = self._from_cache, [value]
        while stack:
            at = stack[-1]
            op = at.op
            if at in known or op is None:
                known.setdefault(at, False)
                stack.pop()
            elif op.name == "kv_update_read":
                known[at] = at.index == 0
                stack.pop()
            elif missing := [v for v in op.operands if v not in known]:
                stack += missing
            else:
                known[at] = any(known[v] for v in op.operands)
                stack.pop()
        return known[value]

    def reads_all(self) -> bool:
        """Whether a value that is needed whole is made of a cache that is read by rows."""
        done, stack = set[Value](), [demand.value for demand in self.whole]
        while stack:
            value = stack.pop()
            if value in done or value.op is None:
                continue
            if value.op in self.reads and value.index == 0:
                return True
            done.add(value)
            stack += value.op.operands
        return False

    # -------------------------------------------------------------------------------------- making rows
    def run(self, wanted: Sequence[Demand], given: Mapping[Demand, Any], positions: Any) -> list[Any]:
        """The rows wanted, for one request.

        Args:
          given: Arrays of one request for `whole` demands, all their rows, and for reads, the rows read.
          positions: i32 `[S]`.
        """
        made: dict[Demand, Any] = {}

        def make(demand: Demand) -> Any:
            if demand in made:
                return made[demand]
            if demand in given:
                made[demand] = given[demand] if demand not in self.nodes else _taken(demand, given[demand], positions)
                return made[demand]
            node = self.nodes[demand]
            if node.op is None:
                raise RuntimeError(f"{demand} is not given")
            made[demand] = _apply(node.op, demand, [make(inner) for inner in node.operands], positions)
            return made[demand]

        return [make(demand) for demand in wanted]


def _taken(demand: Demand, whole: Any, positions: Any) -> Any:
    """Rows of a whole value."""
    if demand.rows is None:
        return whole
    if demand.fixed is not None:
        return whole[(slice(None),) * demand.rows + (slice(*demand.fixed),)]
    return jnp.take(whole, jnp.clip(positions, 0, whole.shape[demand.rows] - 1), axis=demand.rows)


def _apply(op: Op, demand: Demand, operands: Sequence[Any], positions: Any) -> Any:
    shape = demand.shape(positions.shape[0])
    if op.name == "slice" and demand.rows is None and operands[0].shape == tuple(shape):
        return operands[0]  # the rows that it cuts out are those that were asked for
    if op.name == "iota" and demand.rows == op.params["dimension"]:
        rows = positions if demand.fixed is None else jnp.arange(*demand.fixed)
        place = [n if d == demand.rows else 1 for d, n in enumerate(shape)]
        return jnp.broadcast_to(rows.astype(op.params["dtype"]).reshape(place), shape)
    params = dict(op.params)
    if op.name == "broadcast_in_dim" or op.name == "iota":
        params["shape"] = tuple(shape)
    elif op.name == "reshape":
        params["new_sizes"] = tuple(shape)
    elif op.name == "slice":
        params["limit_indices"] = tuple(
            shape[d] if d in (demand.batch, demand.rows) else n for d, n in enumerate(params["limit_indices"])
        )
    return compat.bind(op.primitive, operands, params)[demand.value.index]


# ------------------------------------------------------------------------------------------------- rules
_LAYOUTS = frozenset({"broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "convert_element_type"})
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"})


def _sources(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    """For each operand the dimension that runs with dimension `dim` of a result; None where it does not have it.

    Raises:
      NotByRows: There is none that does.
    """
    rule = _RULES.get(op.name)
    if rule is None or has_roles(op):
        raise NotByRows(op, "it is not known to keep rows apart")
    return rule(op, value, dim)


def _pointwise(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    for operand in op.operands:
        has = len(operand.shape) == len(value.shape) and operand.shape[dim] == value.shape[dim]
        yield dim if has else None


def _not_last(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    if dim == len(value.shape) - 1:
        raise NotByRows(op, "its last axis is not kept apart")
    yield from _pointwise(op, value, dim)


def _iota(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    if dim == op.params["dimension"]:
        raise NotByRows(op, "it counts requests")
    yield from ()


def _transpose(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    yield int(op.params["permutation"][dim])


def _broadcast(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    places = [int(d) for d in op.params["broadcast_dimensions"]]
    inner = places.index(dim) if dim in places else None
    yield inner if inner is not None and op.operands[0].shape[inner] == value.shape[dim] else None


def _reshape(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    """The dimension of the same size before which as many elements lie."""
    inner, size, before = op.operands[0].shape, value.shape[dim], math.prod(value.shape[:dim])
    same = [d for d, n in enumerate(inner) if n == size and math.prod(inner[:d]) == before]
    if not same and size > 1:
        raise NotByRows(op, "rows are merged with something else")
    yield same[0] if same else None


def _slice(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    if op.operands[0].shape[dim] != value.shape[dim]:
        raise NotByRows(op, "rows are cut out")
    yield dim


def _concatenate(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    if dim == op.params["dimension"]:
        raise NotByRows(op, "rows are joined with others")
    yield from [dim] * len(op.operands)


def _split(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    if dim == op.params["axis"]:
        raise NotByRows(op, "rows are split")
    yield dim


def _reduce(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    yield [d for d in range(len(op.operands[0].shape)) if d not in op.params["axes"]][dim]


def _dot_general(op: Op, value: Value, dim: int) -> Iterator[int | None]:
    (contracted, batch) = op.params["dimension_numbers"]
    if dim < len(batch[0]):
        yield from (int(batch[0][dim]), int(batch[1][dim]))
        return
    dim -= len(batch[0])
    for side, operand in enumerate(op.operands):
        free = [d for d in range(len(operand.shape)) if d not in contracted[side] and d not in batch[side]]
        yield free[dim] if 0 <= dim < len(free) else None
        dim -= len(free)


_Rule = Callable[[Op, Value, int], Iterator[int | None]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "iota": _iota,
    "rope": _not_last,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "slice": _slice,
    "concatenate": _concatenate,
    "split": _split,
    "dot_general": _dot_general,
}
