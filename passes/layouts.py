"""Arrays laid out by axes: the one place where roles become transposes and reshapes again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from passes.axes import Axes, Axis, Dims, size_of


def lay_out(x: Any, dims: Dims, axes: Axes, wanted: Sequence[Sequence[Axis]], *, is_full: bool = True) -> Any:
    """An array with one dimension for each wanted product of axes.

    Args:
      x: Array or tracer whose dimensions have the axes `dims`.
      is_full: Whether axes that it lacks are broadcast; else a product of which it has none is a dimension of size 1.
    """
    if [axes.expand(dim) for dim in dims] == [tuple(group) for group in wanted]:
        return x
    held = axes.flat(dims)
    x = jnp.reshape(x, [axis.size for axis in held])
    order = [axis for group in wanted for axis in group]
    x = jnp.transpose(x, [held.index(axis) for axis in order if axis in held])
    x = jnp.reshape(x, [axis.size if axis in held else 1 for axis in order])
    wide, flat = [], []
    for group in wanted:
        has_any = is_full or any(axis in held for axis in group)
        wide += [axis.size if has_any else 1 for axis in group]
        flat.append(size_of(group) if has_any else 1)
    return jnp.reshape(jnp.broadcast_to(x, wide), flat)


def lay_back(x: Any, axes: Axes, held: Sequence[Axis], dims: Dims, shape: Sequence[int]) -> Any:
    """An array with the axes `held`, flat or not, in the layout `dims` of a value of this shape."""
    order = axes.flat(dims)
    if order == tuple(held) and x.shape == tuple(shape):
        return x
    x = jnp.reshape(x, [axis.size for axis in held])
    x = jnp.transpose(x, [held.index(axis) for axis in order])
    return jnp.reshape(x, shape)
