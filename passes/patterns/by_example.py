"""A pattern from an ordinary function: what it computes, however the axes of a program lie.

The example is traced at shapes of its own and read as combinators: inputs are captures, constants are numbers,
operations are themselves. Matching it against itself tells each axis by what has it: which captures, which reductions
and contractions, the result. That is its *signature*, and a real match is legal only with the same. Numbers that depend
on shapes, as the size in a mean does, are compared with those of the example traced again at the captured shapes and
dtypes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes import compat
from passes.axes import Axis, View, fresh, scalar_of, size_of
from passes.graph import Graph, Op, Value
from passes.patterns.pattern import Apply, Capture, Contract, Number, Pattern, Reduce, State, Where
from passes.patterns.spellings import power_of
from passes.reader import trace
from passes.simplify import simplify

_LAYOUT = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p"})
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"})
_NO_PARAMS = frozenset({"accuracy", "weak_type", "sharding", "out_sharding", "precision", "preferred_element_type"})
ROOT = "the result"
_MARK = 0.7310585786300049
"""Numbers that stand for a scalar parameter while the example is read: this one, a little larger for each."""

Kind = frozenset[str]
"""What has an axis: names of captures, of spans, and `ROOT`."""


class NotAPattern(ValueError):
    """An example does something that a pattern cannot say."""


def by_example(
    fn: Callable[..., Any],
    *shapes: Sequence[int],
    numbers: Mapping[str, float] | None = None,
    dtype: Any = jnp.float32,
    keep: frozenset[str] = frozenset(),
) -> Pattern:
    """The pattern of a function.

    Args:
      fn: Of arrays, in order, then of the scalars that `numbers` names; gives one array. Captures have the names of its
        parameters.
      shapes: At which it is traced; sizes that differ tell axes apart, none should be 1.
      numbers: Scalar parameters that may be any number, each with an ordinary value.
      keep: Names of calls that stay operations, as where functions with derivatives of their own do.

    Raises:
      NotAPattern: the function indexes, loops, or has several results.
    """
    names = tuple(inspect.signature(fn).parameters)[: len(shapes)]
    example = _Example(fn, names, tuple(numbers or ()), keep)
    marks = tuple(_MARK + i / 64 for i in range(len(example.scalars)))
    graph = example.graph([tuple(s) for s in shapes], [jnp.dtype(dtype)] * len(shapes), marks)
    read = _Reading(graph, example, marks)
    pattern = read.pattern(graph.outputs[0])
    root = View(graph.outputs[0], fresh(graph.outputs[0].shape))
    itself = next(pattern.match(root, State()), None)
    if itself is None:
        raise NotAPattern(f"{fn} does not match itself")
    signature = _kinds(itself, root)
    dims = {name: _example_dims(itself, root, name) for name in example.names if name in itself.captures}
    return _Legal(pattern, example, signature, dims)


@dataclass(frozen=True)
class _Example:
    """An example function: names of its arrays and of its scalars."""

    fn: Callable[..., Any]
    names: tuple[str, ...]
    scalars: tuple[str, ...]
    keep: frozenset[str]

    def graph(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any], scalars: Sequence[float]) -> Graph:
        """The simplified graph of the function at some shapes."""
        arrays = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        graph, _ = trace(lambda *xs: self.fn(*xs, *scalars), *arrays, keep=self.keep)
        simplify(graph)
        if len(graph.outputs) != 1:
            raise NotAPattern(f"an example gives one array, {self.fn} gives {len(graph.outputs)}")
        return graph


def _constants(graph: Graph) -> list[float]:
    """The numbers of a graph, in order."""
    found = [scalar_of(v) for op in graph.ops for v in op.operands if v.const is not None]
    return [number for number in found if number is not None]


@dataclass
class _Reading:
    """Reads a graph as combinators. `pattern` numbers reductions and constants in the order in which they come."""

    graph: Graph
    example: _Example
    marks: tuple[float, ...]

    def __post_init__(self) -> None:
        self.captures = {v: Capture(name) for v, name in zip(self.graph.inputs, self.example.names, strict=True)}
        self.spans: dict[Op, str] = {}
        self.constants: dict[tuple[Op, int], int] = {}
        for op in self.graph.ops:
            for i, v in enumerate(op.operands):
                if v.const is not None and scalar_of(v) is not None:
                    self.constants[op, i] = len(self.constants)

    def pattern(self, value: Value) -> Pattern:
        """What computes a value."""
        if value in self.captures:
            return self.captures[value]
        op = value.op
        if op is None or op.regions or len(op.results) != 1:
            raise NotAPattern(f"an example is made of operations on its arguments, got {value}")
        if op.name in _LAYOUT or op.name == "convert_element_type":
            return self._operand(op, 0)
        if op.name in _REDUCTIONS:
            return Reduce(op.name, self._operand(op, 0), self._span(op))
        if op.name == "dot_general":
            return Contract(self._operand(op, 0), self._operand(op, 1), self._span(op))
        if op.name == "square" or op.name == "integer_pow" and op.params["y"] in (2, 3):
            return power_of(self._operand(op, 0), op.params.get("y", 2))
        operands = tuple(self._operand(op, i) for i in range(len(op.operands)))
        if op.name in compat.CALL_PRIMITIVES:
            return Apply((op.name,), operands, _Calls(_called(op)))
        told = {k: v for k, v in op.params.items() if k not in _NO_PARAMS and v is not None}
        return Apply((op.name,), operands, _HasParams(tuple(sorted(told.items()))) if told else None)

    def _operand(self, op: Op, i: int) -> Pattern:
        value = op.operands[i]
        if value.const is None:
            return self.pattern(value)
        number = scalar_of(value)
        if number is None:
            raise NotAPattern(f"a constant of an example is one number, got {value}")
        for name, mark in zip(self.example.scalars, self.marks, strict=True):
            if abs(number - mark) < 1e-6:
                return Number(name=name)
        return Number(name=f"constant {self.constants[op, i]}")

    def _span(self, op: Op) -> str:
        return self.spans.setdefault(op, f"span {len(self.spans)}")


@dataclass(frozen=True)
class _HasParams:
    """Whether an operation has parameters of these values."""

    params: tuple[tuple[str, Any], ...]

    def __call__(self, op: Op) -> bool:
        return all(op.params.get(name) == value for name, value in self.params)


@dataclass(frozen=True)
class _Calls:
    """Whether a call, such as one with a derivative of its own, does these operations in order."""

    names: tuple[str, ...]

    def __call__(self, op: Op) -> bool:
        return _called(op) == self.names


def _called(op: Any) -> tuple[str, ...]:
    """What a call, an operation or an equation, does: operations with their scalar operands."""
    jaxpr = compat.called_jaxpr(op)
    if jaxpr is None:
        return ()
    inner, _ = compat.open_jaxpr(jaxpr)
    out: list[str] = []
    for eqn in inner.eqns:
        nested = _called(eqn)
        literals = [str(atom.val) for atom in eqn.invars if compat.is_literal(atom)]
        out += nested or (" ".join([eqn.primitive.name, *literals]),)
    return tuple(out)


@dataclass(frozen=True, eq=False)
class _Legal(Pattern):
    """A pattern that matches only with the example's signature, and with its numbers at the captured shapes."""

    inner: Pattern
    example: _Example
    signature: frozenset[Kind]
    dims: Mapping[str, tuple[Kind, ...]]

    def match(self, view: View, state: State) -> Any:
        spans_before = frozenset(state.spans)
        condition = Where(self.inner, lambda found: self._has_signature(found, view), "the example's axes")
        numbers = Where(condition, self._has_numbers, "the example's numbers")
        if spans_before & {f"span {i}" for i in range(len(self.signature))}:
            raise NotAPattern("an example stands by itself, not within another pattern")
        yield from numbers.match(view, state)

    @property
    def heads(self) -> frozenset[str] | None:
        return self.inner.heads

    def _has_signature(self, state: State, root: View) -> bool:
        """Axes of other kinds than the example's make a match illegal; an axis of size 1 may be lacking."""
        return _kinds(state, root) <= self.signature

    def _has_numbers(self, state: State) -> bool:
        shapes = [self._shape(state, name) for name in self.example.names]
        dtypes = [state.dtypes.get(name, jnp.float32) for name in self.example.names]
        scalars = [state.numbers[name] for name in self.example.scalars]
        try:
            wanted = _constants(self.example.graph(shapes, dtypes, scalars))
        except (TypeError, ValueError):
            return False
        given = {int(k.split()[1]): v for k, v in state.numbers.items() if k.startswith("constant ")}
        return all(i < len(wanted) and np.isclose(wanted[i], v, rtol=1e-7, atol=0.0) for i, v in given.items())

    def _shape(self, state: State, name: str) -> tuple[int, ...]:
        """The shape of a capture as the example has it: all axes of one kind in the first of its dimensions."""
        view = state.captures[name]
        kinds = _axis_kinds(state)
        left = list(state.axes.flat(view.dims))
        shape: list[int] = []
        for kind in self.dims[name]:
            taken = [axis for axis in left if kinds.get(axis, frozenset()) == kind - {ROOT}]
            left = [axis for axis in left if axis not in taken]
            shape.append(size_of(taken))
        return tuple(shape)


def _axis_kinds(state: State) -> dict[Axis, Kind]:
    """For each axis the captures and spans that have it."""
    kinds: dict[Axis, Kind] = {}
    for name, view in state.captures.items():
        for axis in state.axes.flat(view.dims):
            kinds[axis] = kinds.get(axis, frozenset()) | {name}
    for name, span in state.spans.items():
        for axis in state.axes.expand(span):
            kinds[axis] = kinds.get(axis, frozenset()) | {name}
    return kinds


def _kinds(state: State, root: View) -> frozenset[Kind]:
    """The signature of a match."""
    kinds = _axis_kinds(state)
    for axis in state.axes.flat(root.dims):
        kinds[axis] = kinds.get(axis, frozenset()) | {ROOT}
    return frozenset(kinds.values())


def _example_dims(state: State, root: View, name: str) -> tuple[Kind, ...]:
    """The kind of each dimension of a capture of the example."""
    kinds = _axis_kinds(state)
    dims = [state.axes.expand(dim) for dim in state.captures[name].dims]
    return tuple(kinds[dim[0]] if dim else frozenset() for dim in dims)
