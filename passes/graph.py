"""The graph: an SSA program with regions that passes may rewrite in place.

It holds what a jaxpr holds, in a mutable form: values, operations, and for `scan`, `while` and `cond` the graphs of
their bodies as regions. Call-like equations are gone (inlined by `passes.reader`). It knows no model, kernel or
mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Source:
    """Where the user's code made an operation: the chain of frames, innermost first; empty when unknown."""

    frames: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.frames[0][0]}:{self.frames[0][1]}" if self.frames else "unknown source line"

    @property
    def short(self) -> str:
        """File name without its folders, and line."""
        return str(self).rsplit("/", 1)[-1]


class Value:
    """One SSA value. Invariant: exactly one of these holds: it has an `op`, a `const`, or is a graph's input.

    Identity is the object: two values are equal only when they are the same.

    Attributes:
      path: For an input that is a parameter its name, such as `layers.0.mlp.up.kernel`; else None.
    """

    __slots__ = ("aval", "const", "index", "op", "path")

    def __init__(self, aval: Any, op: Op | None = None, index: int = 0, const: Any = None, path: str | None = None):
        self.aval, self.op, self.index, self.const, self.path = aval, op, index, const, path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the array; PRNG keys count as eight."""
        return self.size * getattr(self.dtype, "itemsize", 8)

    @property
    def source(self) -> Source:
        return self.op.source if self.op is not None else Source()

    def __repr__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Op:
    """One operation: a JAX primitive applied to values, with regions where it has bodies.

    Invariants: `results[i].op is self and results[i].index == i`; `params` of `scan`, `while` and `cond` are the
    version-independent ones of `passes.compat.region_params` and their bodies are `regions` only.
    """

    __slots__ = ("effects", "operands", "params", "primitive", "regions", "results", "source")

    def __init__(
        self,
        primitive: Any,
        operands: list[Value],
        params: dict[str, Any],
        avals: list[Any],
        regions: tuple[Graph, ...] = (),
        source: Source = Source(),
        effects: Any = (),
    ):
        self.primitive, self.operands, self.params = primitive, list(operands), dict(params)
        self.regions, self.source, self.effects = regions, source, effects
        self.results = [Value(aval, self, i) for i, aval in enumerate(avals)]

    @property
    def name(self) -> str:
        return self.primitive.name

    @property
    def result(self) -> Value:
        """The only result of an operation that has one."""
        return self.results[0]

    def __repr__(self) -> str:
        return f"{self.name} at {self.source.short}"


@dataclass(eq=False)
class Graph:
    """A program or a region: inputs, operations in an order that defines before use, outputs.

    Regions are closed: an operation uses only values of its own graph, what a body needs comes in as an operand.
    """

    inputs: list[Value]
    ops: list[Op] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    def users(self) -> dict[Value, list[Op]]:
        """For each value the operations of this graph that read it, one entry a reading operand."""
        out: dict[Value, list[Op]] = {}
        for op in self.ops:
            for value in op.operands:
                out.setdefault(value, []).append(op)
        return out

    def walk(self) -> Iterator[tuple[Graph, Op]]:
        """Every operation with the graph it stands in, regions after the operation that owns them."""
        for op in self.ops:
            yield self, op
            for region in op.regions:
                yield from region.walk()

    def count(self) -> int:
        """Number of operations, bodies counted once."""
        return sum(1 for _ in self.walk())

    def replace(self, replacements: dict[Value, Value]) -> None:
        """Makes every operand and output of this graph that is a key the value it maps to (chains are followed)."""

        def final(value: Value) -> Value:
            while value in replacements:
                value = replacements[value]
            return value

        for op in self.ops:
            op.operands = [final(v) for v in op.operands]
        self.outputs = [final(v) for v in self.outputs]
