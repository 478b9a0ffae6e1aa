"""Replays a graph through JAX, so that it can be traced, differentiated, vmapped and run again.

`widen` replays with every narrow float made wide: dtypes sit in an equation's parameters, so wide inputs alone would
not do it. Control flow is rebuilt with `lax.scan`, `lax.while_loop` and `lax.switch`, whose parameters differ by
version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes import compat
from passes.graph import Graph, Op, Value
from passes.ops import associative_scan

_DTYPE_PARAMS = ("new_dtype", "preferred_element_type", "dtype")
_SCATTERS = {
    "scatter-add": lax.scatter_add,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}


class Widening:
    """Maps narrow float dtypes to a wide one; `Widening(None)` leaves everything as it is.

    Attributes:
      is_expanding: Operations of ours and calls are replaced by what they stand for, whose own dtypes can be widened.
    """

    def __init__(self, wide: Any | None, *, is_expanding: bool = False):
        self.wide, self.is_expanding = None if wide is None else jnp.dtype(wide), is_expanding

    def dtype(self, dtype: Any) -> Any:
        """The dtype that a value of `dtype` has in the replay."""
        if self.wide is None or compat.is_extended_dtype(dtype) or not jnp.issubdtype(dtype, jnp.floating):
            return dtype
        return self.wide if jnp.finfo(dtype).bits < jnp.finfo(self.wide).bits else dtype

    def array(self, x: Any) -> Any:
        """Casts one array, leaving anything that is not a narrow float."""
        dtype = jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype
        wide = self.dtype(dtype)
        return x if wide == dtype else jnp.asarray(x).astype(wide)

    def params(self, params: dict[str, Any]) -> dict[str, Any]:
        """An equation's parameters with the dtypes in them widened."""
        if self.wide is None:
            return params
        out = dict(params)
        for key in _DTYPE_PARAMS:
            if out.get(key) is not None:
                out[key] = self.dtype(out[key])
        return out


SAME = Widening(None)


def apply_op(op: Op, operands: Sequence[Any], widening: Widening = SAME) -> list[Any]:
    """Applies one operation to arrays."""
    if op.name == "scan":
        return _scan(op, operands, widening)
    if op.name == "while":
        return _while(op, operands, widening)
    if op.name == "cond":
        branches = [_as_function(region, widening) for region in op.regions]
        return list(lax.switch(jnp.asarray(operands[0], jnp.int32), branches, *operands[1:]))
    if op.name == "associative_scan":
        consts, elems = operands[: op.params["num_consts"]], operands[op.params["num_consts"] :]
        combine = _as_function(op.regions[0], widening)
        return associative_scan.run(lambda *x: combine(*consts, *x), elems, op.params["axes"], op.params["reverse"])
    if widening.wide is not None and op.name == "reduce_precision":
        return [operands[0]]
    if widening.wide is not None and (scatter := _SCATTERS.get(op.name.replace("_", "-"))) is not None:
        return [_scatter(scatter, op, operands)]
    if widening.is_expanding and (meaning := compat.meaning_of(op.primitive)) is not None:
        out = meaning(*operands, **op.params)
        return list(out) if op.primitive.multiple_results else [out]
    if widening.is_expanding and (called := compat.called_jaxpr(op)) is not None:
        return compat.run_jaxpr(called, *operands)
    return compat.bind(op.primitive, operands, widening.params(op.params))


def _scatter(scatter: Callable[..., Any], op: Op, operands: Sequence[Any]) -> Any:
    """A scatter made anew: the function that combines two elements is a jaxpr of narrow dtypes in its parameters."""
    p = op.params
    flags = {key: p[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
    return scatter(*operands, p["dimension_numbers"], **flags)


def _as_function(graph: Graph, widening: Widening) -> Callable[..., list[Any]]:
    return lambda *args: evaluate(graph, args, widening)


def _scan(op: Op, operands: Sequence[Any], widening: Widening) -> list[Any]:
    p, body = op.params, op.regions[0]
    consts, carry, xs = split_scan(op, list(operands))

    def step(c: Any, x: Any) -> tuple[Any, Any]:
        out = evaluate(body, [*consts, *c, *x], widening)
        return out[: p["num_carry"]], out[p["num_carry"] :]

    final, ys = lax.scan(step, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*final, *ys]


def split_scan(op: Op, items: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Divides a scan's operands (or its body's inputs) into constants, carries and scanned inputs."""
    a = op.params["num_consts"]
    b = a + op.params["num_carry"]
    return items[:a], items[a:b], items[b:]


def _while(op: Op, operands: Sequence[Any], widening: Widening) -> list[Any]:
    a = op.params["cond_nconsts"]
    b = a + op.params["body_nconsts"]
    cond, body = op.regions
    cond_consts, body_consts, init = operands[:a], operands[a:b], operands[b:]
    return list(
        lax.while_loop(
            lambda c: evaluate(cond, [*cond_consts, *c], widening)[0],
            lambda c: evaluate(body, [*body_consts, *c], widening),
            list(init),
        )
    )


def evaluate(graph: Graph, args: Sequence[Any], widening: Widening = SAME) -> list[Any]:
    """Runs a graph on arrays or tracers.

    Args:
      args: One array for each of `graph.inputs`; widened first where `widening` asks for it.

    Returns: The outputs, in order.
    """
    env: dict[Value, Any] = {v: widening.array(x) for v, x in zip(graph.inputs, args, strict=True)}

    def read(value: Value) -> Any:
        return widening.array(value.const) if value.const is not None else env[value]

    for op in graph.ops:
        env.update(zip(op.results, apply_op(op, [read(v) for v in op.operands], widening), strict=True))
    return [read(v) for v in graph.outputs]


def abstract_args(graph: Graph) -> list[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a graph's inputs, for tracing it."""
    return [jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=getattr(v.aval, "weak_type", False)) for v in graph.inputs]


def to_jaxpr(graph: Graph) -> Any:
    """The closed jaxpr of a graph."""
    return jax.make_jaxpr(lambda *args: evaluate(graph, args))(*abstract_args(graph))


def constant(value: Any, aval: Any | None = None) -> Value:
    """A value that is known now."""
    array = np.asarray(value)
    return Value(aval if aval is not None else compat.shaped(array.shape, array.dtype), const=array)
