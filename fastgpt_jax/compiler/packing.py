"""Keeps what parameters alone determine, made once and shared by all entry points.

Each entry point splits into `prepare` and `step`; values that cross are named by the expression that makes them, so
that two entry points that want the same packed weight find the same array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from passes.extract import extract
from passes.graph import Graph, Value
from passes.replay import evaluate


class PackedStore:
    """Packed values of one model. Invariant: a parameter that is used as it is, is kept once and never copied."""

    def __init__(self, leaves: Sequence[Any]):
        self._leaves = list(leaves)
        self._made: dict[str, Any] = {}

    def fetch(self, prepare: Graph) -> list[Any]:
        """The outputs of `prepare(leaves)`, made now if no entry point has asked for them before."""
        position = {v: i for i, v in enumerate(prepare.inputs)}
        names = _expressions(prepare)
        keys = [names[v] for v in prepare.outputs]
        missing = [v for v in dict.fromkeys(prepare.outputs) if v not in position and names[v] not in self._made]
        if missing:
            part = extract(prepare, prepare.inputs, missing)
            made = jax.jit(lambda *leaves: evaluate(part, leaves))(*self._leaves)
            self._made.update(zip((names[v] for v in missing), made, strict=True))
        return [
            self._leaves[position[v]] if v in position else self._made[key]
            for v, key in zip(prepare.outputs, keys, strict=True)
        ]


def _expressions(graph: Graph) -> dict[Value, str]:
    """A name for each value: a digest of the operations and parameters that make it."""
    names = {v: f"input {i}" for i, v in enumerate(graph.inputs)}

    def name(value: Value) -> str:
        if value.const is not None:
            array = np.asarray(value.const)
            return f"constant {array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
        return names[value]

    for op in graph.ops:
        parts = [op.name, repr(sorted(op.params.items(), key=lambda item: item[0])), *map(name, op.operands)]
        parts += [repr(_expressions(region)) for region in op.regions]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        for result in op.results:
            names[result] = f"{digest} {result.index}"
    return names
