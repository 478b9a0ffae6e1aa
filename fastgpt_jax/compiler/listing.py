"""A graph as rows that a reader can follow: one operation each, what is repeated shown once, with its cost.

Knows no output format. Rows stand in the order of the program; the bodies of loops follow the operation that owns them,
one level deeper.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastgpt_jax.compiler.roofline import Bound, Machine
from passes.cost import Cost, op_cost
from passes.graph import Graph, Op, Source, Value
from passes.repeats import Repeat, find_repeats, likeness, num_live

LAYOUT_ONLY = frozenset(
    "expand_dims name optimization_barrier pvary reshape sharding_constraint squeeze stop_gradient".split()
)
"""Operations that a compiler turns into nothing."""
_UNSAID = frozenset(
    "accuracy dtype fill_value indices_are_sorted mode new_dtype new_sizes out_sharding precision sharding shape "
    "unique_indices weak_type".split()
)
_NUMPY_NUMBER = re.compile(r"np\.\w+\(([^()]*)\)")
LEAST_REPEATED = 8
"""Rows of the shortest stretch that is shown once."""
_MAX_PARAM = 64
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u"}


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
      results: Number and type of each result, as in `(12, "f32[1, 64]")`.
      operands: A number of a result or an input, or the text of a constant.
      source: Index of the file in the X-ray's sources and the line; None where unknown.
      made_by: The pass that made or changed it; empty for what the derivation made.
      is_gone: The next pass takes it away.
      is_prepared: Parameters alone determine it: it runs once, offline, and costs a step nothing.
      flops, nbytes: Of one run of the step, this copy alone; the trips of loops around it are counted.
      bound: What it waits for.
      depth: Loops around it.
    """

    name: str
    results: tuple[tuple[int, str], ...]
    operands: tuple[int | str, ...]
    params: str
    source: tuple[int, int] | None
    made_by: str
    is_gone: bool
    is_prepared: bool
    flops: int
    nbytes: int
    bound: Bound
    depth: int


@dataclass(frozen=True)
class Listing:
    """A program.

    Attributes:
      inputs: Number, type and meaning of each input that a row reads.
      rows: All rows, with only the first copy of what is repeated.
      repeats: Stretches of `rows` (start and length count rows shown) that stand for `count` copies.
      num_ops: Operations of the whole program, copies counted, bodies of loops once.
      flops, nbytes: Of a step; what is prepared is not in them.
      seconds: The least time of a step, operation after operation.
    """

    inputs: tuple[tuple[int, str, str], ...]
    rows: tuple[Row, ...]
    repeats: tuple[Repeat, ...]
    num_ops: int
    flops: int
    nbytes: int
    seconds: float


def make_listing(
    graph: Graph,
    input_names: Sequence[str],
    is_static: Sequence[bool],
    machine: Machine,
    files: dict[str, int],
    made_by: Mapping[Op, str],
) -> tuple[Listing, list[Op]]:
    """Lists a graph; gives the operation of each row too.

    Args:
      input_names: What each input is called.
      is_static: For each input whether it is known before the step runs.
      files: Numbers of source files; new ones are added.
    """
    lister = _Lister(machine, files, made_by)
    for value in graph.inputs:
        lister.define(value)
    repeats = find_repeats([likeness(op) for op in graph.ops], LEAST_REPEATED, num_live(graph))
    static = {v for v, known in zip(graph.inputs, is_static, strict=True) if known}
    shown = lister.add_top(graph, repeats, static)
    read = {number for row in lister.rows for number in row.operands if isinstance(number, int)}
    named = zip(graph.inputs, input_names, strict=True)
    inputs = [(n, type_text(v), name) for v, name in named if (n := lister.numbers[v]) in read]
    total = lister.total
    rows = tuple(lister.rows)
    return Listing(tuple(inputs), rows, shown, graph.count(), total.flops, total.bytes, lister.seconds), lister.ops


def mark_gone(listing: Listing, ops: Sequence[Op], left: Collection[Op]) -> Listing:
    """The listing with the rows marked whose operations a pass did not leave."""
    rows = (replace(row, is_gone=op not in left) for row, op in zip(listing.rows, ops, strict=True))
    return replace(listing, rows=tuple(rows))


class _Lister:
    def __init__(self, machine: Machine, files: dict[str, int], made_by: Mapping[Op, str]):
        self._machine, self._files, self._made_by = machine, files, made_by
        self.numbers: dict[Value, int] = {}
        self.rows: list[Row] = []
        self.ops: list[Op] = []
        self.total, self.seconds = Cost(), 0.0
        self._copies = 1

    def define(self, value: Value) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    def add_top(self, graph: Graph, repeats: Sequence[Repeat], static: set[Value]) -> tuple[Repeat, ...]:
        """Adds the rows of a program; returns its repeats in rows."""
        by_start = {repeat.start: repeat for repeat in repeats}
        shown, place = [], 0
        while place < len(graph.ops):
            repeat = by_start.get(place, Repeat(place, 1, 1))
            first_row, self._copies = len(self.rows), repeat.count
            first = graph.ops[place : place + repeat.length]
            for op in first:
                self._add(op, static, 1, 0)
            self._alias(graph, repeat, static)
            if repeat.count > 1:
                shown.append(Repeat(first_row, len(self.rows) - first_row, repeat.count))
            place = repeat.end
        return tuple(shown)

    def _alias(self, graph: Graph, repeat: Repeat, static: set[Value]) -> None:
        """What later copies make goes by the numbers of the first."""
        for i in range(repeat.start + repeat.length, repeat.end):
            first = graph.ops[repeat.start + (i - repeat.start) % repeat.length]
            for value, twin in zip(graph.ops[i].results, first.results, strict=True):
                self.numbers[value] = self.numbers[twin]
                if twin in static:
                    static.add(value)

    def _add(self, op: Op, static: set[Value], trips: int, depth: int) -> None:
        is_prepared = all(v in static or v.const is not None for v in op.operands) and not op.effects
        is_prepared = is_prepared and bool(op.operands)
        if is_prepared:
            static.update(op.results)
        operands = tuple(self._use(v) for v in op.operands)
        self.ops.append(op)
        row = Row(
            op.name,
            tuple((self.define(v), type_text(v)) for v in op.results),
            operands,
            _params_text(op),
            self._place(op.source),
            self._made_by.get(op, ""),
            False,
            is_prepared,
            0,
            0,
            "free",
            depth,
        )
        if op.name in LAYOUT_ONLY or is_prepared:
            self.rows.append(row)
        elif op.regions and op.name in ("scan", "while", "cond"):
            self.rows.append(row)
            inner = trips * op.params.get("length", 1)
            for region in op.regions:
                for value in region.inputs:
                    self.define(value)
                for child in region.ops:
                    self._add(child, static, inner, depth + 1)
        else:
            cost = op_cost(op).times(trips)
            bound = self._machine.bound(cost.flops, cost.bytes)
            self.rows.append(replace(row, flops=cost.flops, nbytes=cost.bytes, bound=bound))
            self.total += cost.times(self._copies)
            self.seconds += self._machine.seconds(cost.flops, cost.bytes) * self._copies

    def _use(self, value: Value) -> int | str:
        if value.const is None:
            return self.define(value)
        const = np.asarray(value.const) if isinstance(value.const, np.ndarray) else None
        return f"{const.item():.6g}" if const is not None and const.ndim == 0 else f"const {type_text(value)}"

    def _place(self, source: Source) -> tuple[int, int] | None:
        if not source.frames:
            return None
        file, line = source.frames[0]
        return self._files.setdefault(file, len(self._files)), line


def type_text(value: Value) -> str:
    """A type in few letters, as in `f32[1, 64]`."""
    name = str(value.dtype)
    for long, short in sorted(_DTYPES.items(), key=lambda pair: -len(pair[0])):
        if name.startswith(long) and name[len(long) :][:1].isdigit():
            name = short + name[len(long) :]
            break
    return f"{name}[{', '.join(map(str, value.shape))}]" if value.shape else name


def _params_text(op: Op) -> str:
    """What the types of operands and results do not say already."""
    texts = []
    for key, param in sorted(op.params.items()):
        if key in _UNSAID or param is None or param is False or param == ():
            continue
        text = _NUMPY_NUMBER.sub(r"\1", " ".join(str(param).split()))
        texts.append(f"{key}={text if len(text) <= _MAX_PARAM else text[:_MAX_PARAM] + '…'}")
    return ", ".join(texts)
