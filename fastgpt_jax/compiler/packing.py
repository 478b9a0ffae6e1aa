"""Keeps what parameters alone determine, made once and shared by all entry points under a name.

Each entry point splits into `prepare` and `step`; values that cross are named by the expression that makes them, so
that two entry points that want the same packed weight find the same array. A parameter that is used as it is keeps its
path as name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from passes import compat
from passes.extract import extract
from passes.graph import Graph, Value
from passes.replay import evaluate


class PackedStore:
    """Weights of one model. Invariant: a parameter that is used as it is, is kept once and never copied."""

    def __init__(self, paths: Sequence[str], leaves: Sequence[Any], sharding: Any = None):
        """Makes a store of parameters.

        Args:
          paths: The name of each leaf; names that occur twice are told apart by a number.
          sharding: Where constants go, whole; by default on JAX's default device.
        """
        self._inputs = dict(zip(_unique(paths), leaves, strict=True))
        self._sharding = sharding
        self._made: dict[str, Any] = {}

    @property
    def paths(self) -> list[str]:
        """The name of each parameter."""
        return list(self._inputs)

    def fetch(self, prepare: Graph, constants: Sequence[np.ndarray]) -> list[str]:
        """Names of the outputs of `prepare(*leaves, *constants)`, made now if nobody has asked for them before."""
        sources = dict(self._inputs) | {f"constant.{_digest(x)}": x for x in constants}
        names = _expressions(prepare, list(sources))
        missing: dict[str, Value] = {}
        for value in prepare.outputs:
            name = names[value]
            if name in self._made:
                continue
            if name in sources and name not in self._inputs:
                self._made[name] = jax.device_put(sources[name], self._sharding)
            elif name not in sources:
                missing[name] = value
        if missing:
            part = extract(prepare, prepare.inputs, list(missing.values()))
            made = jax.jit(lambda *inputs: evaluate(part, inputs))(*sources.values())
            self._made.update(zip(missing, made, strict=True))
        return [names[v] for v in prepare.outputs]

    def __getitem__(self, name: str) -> Any:
        """An array as executables take it: PRNG keys as the numbers they are made of."""
        value = self._inputs[name] if name in self._inputs else self._made[name]
        return jax.random.key_data(value) if compat.is_extended_dtype(value.dtype) else value


def _unique(paths: Sequence[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for path in paths:
        seen[path] = seen.get(path, 0) + 1
        yield path if seen[path] == 1 else f"{path}#{seen[path]}"


def _digest(array: Any) -> str:
    array = np.ascontiguousarray(array)
    text = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(text + array.tobytes()).hexdigest()[:16]


def _expressions(graph: Graph, inputs: Sequence[str]) -> dict[Value, str]:
    """A name for each value: that of an input, or a digest of the operations and parameters that make it."""
    names = dict(zip(graph.inputs, inputs, strict=True))

    def name(value: Value) -> str:
        return f"constant {_digest(value.const)}" if value.const is not None else names[value]

    for op in graph.ops:
        parts = [op.name, repr(sorted(op.params.items(), key=lambda item: item[0])), *map(name, op.operands)]
        for region in op.regions:
            inner = _expressions(region, [f"operand {i}" for i in range(len(region.inputs))])
            parts += [inner.get(v) or name(v) for v in region.outputs]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        for result in op.results:
            names[result] = f"packed.{digest}" + (f".{result.index}" if len(op.results) > 1 else "")
    return names
