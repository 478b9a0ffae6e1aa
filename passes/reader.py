"""Reads a jaxpr into a graph: calls inlined, bodies as regions, each operation with the user's source line.

Equations of cached inner jaxprs may have no frame of their own; they get that of the call that brought them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax import lax

from passes import compat
from passes.graph import Graph, Op, Source, Value


def trace(fn: Callable[..., Any], *args: Any, keep: frozenset[str] = frozenset()) -> tuple[Graph, Any]:
    """Traces `fn` on arrays or `ShapeDtypeStruct`s.

    Args:
      keep: Names of call primitives that stay operations instead of being inlined.

    Returns: The graph, whose inputs are the flattened leaves of `args`, and the pytree structure of the result.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    return read_jaxpr(closed, keep=keep), jax.tree.structure(shape)


def read_jaxpr(closed: Any, outer: Source = Source(), keep: frozenset[str] = frozenset()) -> Graph:
    """Reads a closed jaxpr.

    Raises:
      NotImplementedError: the jaxpr holds hijax types, which have no plain array form.
    """
    if compat.is_high(closed):
        raise NotImplementedError("hijax types cannot be compiled; lower the function to plain arrays first")
    jaxpr, consts = compat.open_jaxpr(closed)
    graph = Graph([Value(v.aval) for v in jaxpr.invars])
    graph.outputs = _inline(graph, jaxpr, consts, graph.inputs, outer, keep)
    return graph


def _inline(
    graph: Graph, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value], outer: Source, keep: frozenset[str]
) -> list[Value]:
    env: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = Value(var.aval, const=_concrete(const))

    def read(atom: Any) -> Value:
        return Value(atom.aval, const=compat.literal_array(atom)) if compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        frames = tuple(compat.user_frames(eqn.source_info))
        source = Source(frames) if frames else outer
        operands = [read(atom) for atom in eqn.invars]
        inner = None if eqn.primitive.name in keep else compat.called_jaxpr(eqn)
        if inner is not None:
            body, body_consts = compat.open_jaxpr(inner)
            results = _inline(graph, body, body_consts, operands, source, keep)
        else:
            regions = tuple(read_jaxpr(body, source, keep) for body in compat.region_jaxprs(eqn))
            params = compat.region_params(eqn) if regions else eqn.params
            if eqn.primitive.name == "reshape" and params.get("dimensions") is not None:
                operands = [_transposed(graph, operands[0], params["dimensions"], source)]
                params = {**params, "dimensions": None}
            avals = [v.aval for v in eqn.outvars]
            op = Op(eqn.primitive, operands, _plain(params), avals, regions, source, eqn.effects)
            graph.ops.append(op)
            results = op.results
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _transposed(graph: Graph, value: Value, permutation: Sequence[int], source: Source) -> Value:
    """The transpose that a reshape in another order of dimensions begins with, as an operation."""
    params = {"permutation": tuple(permutation)}
    avals = compat.infer_types(lax.transpose_p, [value.aval], params)
    op = Op(lax.transpose_p, [value], params, avals or [], source=source)
    graph.ops.append(op)
    return op.result


def _plain(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with NumPy's integers, which user code may hand to JAX as an axis, as Python's."""
    return {key: int(x) if isinstance(x, np.integer) else x for key, x in params.items()}


def _concrete(const: Any) -> Any:
    if isinstance(const, jax.core.Tracer):
        raise NotImplementedError("a function that closes over traced values cannot be read; pass them as arguments")
    if isinstance(const, jax.Array) and not compat.is_extended_dtype(const.dtype):
        return np.asarray(const)
    return const
