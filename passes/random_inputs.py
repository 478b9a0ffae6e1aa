"""Random arguments for a graph, each operand drawn by itself and in a range that the program can take.

Floats are drawn in float64, so that a wide run sees digits that a narrow one rounds away. An integer that indexes an
array stays inside it; one of 8 bits or fewer, or without a sign, is data and takes every value; another is a position:
rising along its last axis in some trials, anything small in the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes.graph import Graph, Op, Value

NUM_TRIALS = 3
"""Normal floats and rising positions; normal floats and random integers; positive floats and random integers."""
POSITION_LIMIT = 64
_SHARE_TRUE = 0.75


def random_arguments(graph: Graph, trial: int) -> list[Any]:
    """One argument for each input of a graph; the same for the same trial.

    Args:
      trial: From 0 to `NUM_TRIALS - 1`.
    """
    limits = index_limits(graph)
    return [
        _draw(value, np.random.default_rng([zlib.crc32(b"rewrite"), trial, i]), trial, limits.get(value))
        for i, value in enumerate(graph.inputs)
    ]


def _draw(value: Value, rng: np.random.Generator, trial: int, limit: int | None) -> Any:
    dtype, shape = jnp.dtype(value.dtype), value.shape
    if value.dtype == bool:
        return rng.random(shape) < _SHARE_TRUE
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        normal = rng.standard_normal(shape)
        return np.abs(normal) + 0.1 if trial == 2 else normal
    info = jnp.iinfo(dtype)
    if limit is None and (info.bits <= 8 or info.min == 0):
        return rng.integers(int(info.min), int(info.max), shape, np.int64, endpoint=True).astype(dtype)
    limit = min(POSITION_LIMIT if limit is None else max(limit, 1), int(info.max) + 1)
    if trial == 0 and shape:
        start = rng.integers(0, max(1, limit - shape[-1] + 1))
        return (np.broadcast_to(np.arange(shape[-1]) + start, shape) % limit).astype(dtype)
    return rng.integers(0, limit, shape).astype(dtype)


def index_limits(graph: Graph) -> Mapping[Value, int]:
    """For each integer input that indexes an array, how many places there are to index."""
    limits: dict[Value, int] = {}
    for op in reversed(graph.ops):
        for operand, limit in _indexed(op):
            limits[operand] = min(limit, limits.get(operand, limit))
        reached = [limits[r] for r in op.results if r in limits]
        if reached and not op.regions:  # what an index is made of is taken for an index too
            for operand in op.operands:
                if operand.const is None and jnp.issubdtype(operand.dtype, jnp.integer):
                    limits[operand] = min([*reached, limits.get(operand, reached[0])])
    return {value: limits[value] for value in graph.inputs if value in limits}


def _indexed(op: Op) -> Sequence[tuple[Value, int]]:
    if op.name == "gather":
        numbers, sizes, shape = op.params["dimension_numbers"], op.params["slice_sizes"], op.operands[0].shape
        places = [shape[d] - sizes[d] + 1 for d in numbers.start_index_map]
        return [(op.operands[1], min(places, default=1))]
    if op.name.startswith("scatter"):
        numbers, shape = op.params["dimension_numbers"], op.operands[0].shape
        places = [shape[d] for d in numbers.scatter_dims_to_operand_dims]
        return [(op.operands[1], min(places, default=1))]
    if op.name == "dynamic_slice":
        pairs = zip(op.operands[0].shape, op.params["slice_sizes"], strict=True)
        return [(v, n - size + 1) for v, (n, size) in zip(op.operands[1:], pairs, strict=True)]
    if op.name == "dynamic_update_slice":
        pairs = zip(op.operands[0].shape, op.operands[1].shape, strict=True)
        return [(v, n - size + 1) for v, (n, size) in zip(op.operands[2:], pairs, strict=True)]
    return []


def narrow(arguments: Sequence[Any], graph: Graph) -> list[jax.Array]:
    """The arguments in the dtypes that the graph takes."""
    return [jnp.asarray(x).astype(v.dtype) for x, v in zip(arguments, graph.inputs, strict=True)]


def representable(arguments: Sequence[Any], graph: Graph) -> list[Any]:
    """The arguments rounded to the dtypes that the graph takes, floats as float64 again."""
    rounded = [np.asarray(x).astype(v.dtype) for x, v in zip(arguments, graph.inputs, strict=True)]
    return [x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in rounded]
