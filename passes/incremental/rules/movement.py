"""Operations that move rows along time: slice, pad, concatenate, split, reverse. One mechanism: integer shifts.

Row i of a dimension wanted in role `Rows(d)` is position p - d; cutting s rows off the front asks the operand for d
- s, padding with p rows for d + p. Reading ahead (a negative shift) is refused where it reaches something that
depends on tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.incremental.plan import Recipe
from passes.incremental.roles import KEYS, Role
from passes.incremental.site import Site, restricted_shape


def along(dim: int, rank: int, x: Any) -> Any:
    """A vector laid along one dimension of an array of the given rank."""
    return x.reshape([-1 if d == dim else 1 for d in range(rank)])


def take_rows(ctx: Any, x: Any, dim: int, index: Any) -> Any:
    """Rows of an array that has them all; indices outside are clipped."""
    return jnp.take(x, jnp.clip(index, 0, x.shape[dim] - 1), axis=dim)


def _slice(site: Site) -> Recipe:
    p, short = site.op.params, site.times.short_params[site.op]
    strides = p["strides"] or (1,) * len(site.value.shape)
    return _cut(site, p["start_indices"], short["start_indices"], strides, [])


def _dynamic_slice(site: Site) -> Recipe:
    starts, dynamic = [], []
    for u in site.op.operands[1:]:
        if u.const is not None and np.ndim(u.const) == 0:
            starts.append(int(u.const))
        else:
            starts.append(None)
            dynamic.append(u)
    return _cut(site, starts, starts, (1,) * len(site.value.shape), dynamic)


def _cut(
    site: Site, starts: Sequence[int | None], short_starts: Sequence[int | None], strides: Sequence[int], dynamic: list
) -> Recipe:
    u, v, times = site.op.operands[0], site.value, site.times
    u_time, v_time = times.dims(u), times.dims(v)
    if (
        site.is_dependent
        and not any(map(site.is_rows, site.roles))
        and any(d in u_time and d not in v_time and starts[d] != short_starts[d] for d in range(len(v.shape)))
    ):
        return _last_row(site)
    roles: dict[int, Role] = {}
    for d in u_time:
        first = starts[d]
        if d in v_time and site.is_rows(d):
            if strides[d] != 1 or first is None:
                raise site.refuse("takes every other token, or starts at a computed token")
            if first != short_starts[d]:
                raise site.refuse("cuts time at a place counted from the end")
            roles[d] = site.plain_rows(d).shifted(-first) if first else site.roles[d]
        else:
            roles[d] = KEYS
    start_demands = [site.all_keys(s) for s in dynamic]

    def emit(ctx, xs):
        x, computed = xs[0], iter(xs[1:])
        for d, n in enumerate(v.shape):
            fixed = starts[d]
            start = fixed if fixed is not None else next(computed)
            if d in v_time and site.is_rows(d):
                if d not in u_time:  # a table longer than the sequence, cut to its length
                    x = take_rows(ctx, x, d, start + ctx.indices(site.roles[d], n) * strides[d])
            elif fixed is not None:
                x = lax.slice_in_dim(x, fixed, fixed + (n - 1) * strides[d] + 1 if n else fixed, strides[d], axis=d)
            else:
                x = lax.dynamic_slice_in_dim(x, start, n, axis=d)
        return x

    return Recipe([site.demand(u, roles), *start_demands], emit)


def _last_row(site: Site) -> Recipe:
    """A row counted from the end, such as `roll` brings to the front: zeros, which the certificate shows if used."""

    def emit(ctx, xs):
        return jnp.zeros(restricted_shape(site.value, site.roles, ctx.num_rows), ctx.dtype(site.value.dtype))

    return Recipe([], emit)


def _pad(site: Site) -> Recipe:
    u, fill = site.op.operands
    config = [(int(low), int(high), int(between)) for low, high, between in site.op.params["padding_config"]]
    roles: dict[int, Role] = dict(site.roles)
    shifted = [d for d in site.times.dims(u) if site.is_rows(d) and config[d] != (0, 0, 0)]
    for d in shifted:
        low, _, between = config[d]
        if between:
            raise site.refuse("pads between tokens")
        if site.times.short_params[site.op]["padding_config"][d][0] != low:
            raise site.refuse("pads time by an amount that depends on the length")
        roles[d] = site.plain_rows(d).shifted(low)
    for d in site.times.dims(site.value):
        if site.is_rows(d) and d not in site.times.dims(u):
            raise site.refuse("pads a fixed axis to the length of the sequence")

    def emit(ctx, xs):
        x, value = xs
        inner = [(0, 0, 0) if d in shifted else c for d, c in enumerate(config)]
        x = lax.pad(x, value, inner)
        for d in shifted:
            index = ctx.indices(site.roles[d], site.value.shape[d]) - config[d][0]
            x = jnp.where(along(d, x.ndim, (index >= 0) & (index < u.shape[d])), x, value)
        return x

    return Recipe([site.demand(u, roles), site.all_keys(fill)], emit)


def _concatenate(site: Site) -> Recipe:
    dim, parts = site.op.params["dimension"], list(site.op.operands)
    if not site.is_rows(dim):
        return Recipe([_beside(site, u) for u in parts], lambda ctx, xs: ctx.bind(site, xs))
    role, parts = site.plain_rows(dim), [u for u in parts if u.shape[dim]]
    offsets = np.cumsum([0, *(u.shape[dim] for u in parts)])
    demands = []
    for u, offset in zip(parts, offsets, strict=False):
        if dim in site.times.dims(u) and any(dim in site.times.dims(w) for w in parts[: parts.index(u)]):
            raise site.refuse("joins two sequences along time")
        demands.append(site.demand(u, {**site.roles, dim: role.shifted(int(offset))}))

    def emit(ctx, xs):
        index, out = ctx.indices(role, site.value.shape[dim]), None
        shape = restricted_shape(site.value, site.roles, ctx.num_rows)
        for u, offset, x in zip(parts, offsets, xs, strict=False):
            if dim not in site.times.dims(u):
                x = take_rows(ctx, x, dim, index - offset)
            x = jnp.broadcast_to(x, shape)
            out = x if out is None else jnp.where(along(dim, len(shape), index >= offset), x, out)
        return out

    return Recipe(demands, emit)


def _beside(site: Site, u: Any) -> Any:
    """A demand in the result's roles, with keys for time dimensions that only the operand has."""
    return site.demand(u, {d: site.roles.get(d, KEYS) for d in site.times.dims(u)})


def _split(site: Site) -> Recipe:
    axis, sizes = site.op.params["axis"], site.op.params["sizes"]
    u, start = site.op.operands[0], int(sum(sizes[: site.value.index]))
    if axis not in site.times.dims(u):
        return Recipe([site.same(u)], lambda ctx, xs: ctx.bind(site, xs))
    if site.is_rows(axis):
        if sum(site.times.short_params[site.op]["sizes"][: site.value.index]) != start:
            raise site.refuse("cuts time at a place counted from the end")
        return Recipe(
            [site.demand(u, {**site.roles, axis: site.plain_rows(axis).shifted(-start)})], lambda ctx, xs: xs[0]
        )

    def emit(ctx, xs):
        return lax.slice_in_dim(xs[0], start, start + sizes[site.value.index], axis=axis)

    return Recipe([site.demand(u, {**site.roles, axis: KEYS})], emit)


def _rev(site: Site) -> Recipe:
    if any(site.is_rows(d) for d in site.op.params["dimensions"]):
        raise site.refuse("reverses time: early tokens would see later ones")
    return Recipe([site.same(site.op.operands[0])], lambda ctx, xs: ctx.bind(site, xs))


RULES = MappingProxyType(
    {
        "slice": _slice,
        "dynamic_slice": _dynamic_slice,
        "pad": _pad,
        "concatenate": _concatenate,
        "split": _split,
        "rev": _rev,
    }
)
