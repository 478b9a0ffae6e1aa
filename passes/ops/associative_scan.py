"""`associative_scan` as one operation: a scan over an axis by an associative function of two elements.

Stands in for `jax.lax.associative_scan` while a model is captured, since its usual expansion into slices depends on the
length and hides the recurrence. Meaning: `jax.lax.associative_scan` itself. Incremental rule: see
`passes.incremental.rules.cumulative`. FLOPs: about one combination an element (the expansion does up to two).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from passes import compat


def associative_scan(fn: Callable[..., Any], elems: Any, reverse: bool = False, axis: int = 0) -> Any:
    """`jax.lax.associative_scan`, recorded as one operation.

    `fn` is traced once on elements that keep the scanned axis at size one, so it must treat positions along that axis
    independently, as the original requires too.
    """
    leaves, tree = jax.tree.flatten(elems)
    axes = tuple(axis % x.ndim for x in leaves)
    elements = [lax.slice_in_dim(x, 0, 1, axis=a) for x, a in zip(leaves, axes, strict=True)]

    def combine(*flat: Any) -> list[Any]:
        half = len(flat) // 2
        out = fn(jax.tree.unflatten(tree, flat[:half]), jax.tree.unflatten(tree, flat[half:]))
        return jax.tree.leaves(out)

    body, consts = compat.hoist_constants(combine, *elements, *elements)
    out = associative_scan_p.bind(*consts, *leaves, num_consts=len(consts), axes=axes, reverse=reverse, combine=body)
    return jax.tree.unflatten(tree, out)


def run(combine: Callable[..., Sequence[Any]], elems: Sequence[Any], axes: Sequence[int], reverse: bool) -> list[Any]:
    """Scans arrays with `combine(*left, *right)`, a function of elements that keep each axis at size one."""
    stacked = over_stacks(combine, axes)
    moved = tuple(jnp.moveaxis(x, a, 0) for x, a in zip(elems, axes, strict=True))
    out = lax.associative_scan(lambda a, b: tuple(stacked(*a, *b)), moved, reverse=reverse, axis=0)
    return [jnp.moveaxis(y, 0, a) for y, a in zip(out, axes, strict=True)]


def over_stacks(combine: Callable[..., Any], axes: Sequence[int]) -> Callable[..., Any]:
    """`combine` over stacks of elements: axis 0 runs over elements, each element regains its axis at size one."""

    def one(*flat: Any) -> list[Any]:
        spread = [jnp.expand_dims(x, a) for x, a in zip(flat, (*axes, *axes), strict=True)]
        return [lax.squeeze(y, (a,)) for y, a in zip(combine(*spread), axes, strict=True)]

    return jax.vmap(one)


def _meaning(*operands: Any, num_consts: int, axes: tuple[int, ...], reverse: bool, combine: Any) -> list[Any]:
    consts, elems = operands[:num_consts], operands[num_consts:]
    return run(lambda *flat: compat.run_jaxpr(combine, *consts, *flat), elems, axes, reverse)


def _abstract(*avals: Any, num_consts: int, axes: tuple[int, ...], reverse: bool, combine: Any) -> list[Any]:
    outs = compat.open_jaxpr(combine)[0].outvars
    return [compat.shaped(x.shape, o.aval.dtype) for x, o in zip(avals[num_consts:], outs, strict=True)]


def _batch(args: Sequence[Any], dims: Sequence[Any], *, num_consts: int, axes: Any, reverse: bool, combine: Any) -> Any:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    consts = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args[:num_consts], dims, strict=False)]
    in_const = [None if d is None else 0 for d in dims[:num_consts]]
    elems = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args[num_consts:], dims[num_consts:], strict=True)
    ]
    over = jax.vmap(
        lambda *flat: compat.run_jaxpr(combine, *flat), in_axes=(*in_const, *[0] * (2 * len(elems))), out_axes=0
    )
    moved = tuple(a + 1 for a in axes)
    elements = [lax.slice_in_dim(x, 0, 1, axis=a) for x, a in zip(elems, moved, strict=True)]
    body, _ = compat.hoist_constants(over, *consts, *elements, *elements)
    out = associative_scan_p.bind(*consts, *elems, num_consts=num_consts, axes=moved, reverse=reverse, combine=body)
    return out, [0] * len(out)


associative_scan_p = compat.make_primitive("associative_scan", _meaning, _abstract, _batch)
