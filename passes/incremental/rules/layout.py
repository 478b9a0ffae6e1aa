"""Operations that rearrange or repeat: broadcast, transpose, reshape, squeeze, (un)stack, tile, iota.

A reshape may merge time with other axes or split them again; the role then says how the rows lie in the merged
dimension.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import jax.numpy as jnp
from jax import lax

from passes.graph import Value
from passes.incremental.errors import NotServable
from passes.incremental.plan import Recipe
from passes.incremental.roles import KEYS, Role, Rows
from passes.incremental.site import Site, is_keys, restricted_shape


def _broadcast(site: Site) -> Recipe:
    dims = site.op.params["broadcast_dimensions"]
    (u, *_) = site.op.operands
    roles = {i: site.roles.get(d) for i, d in enumerate(dims)}

    def emit(ctx, xs):
        return lax.broadcast_in_dim(xs[0], restricted_shape(site.value, site.roles, ctx.num_rows), dims)

    return Recipe([site.demand(u, roles)], emit)


def _transpose(site: Site) -> Recipe:
    permutation = site.op.params["permutation"]
    roles = {i: site.roles.get(d) for d, i in enumerate(permutation)}
    return Recipe([site.demand(site.op.operands[0], roles)], lambda ctx, xs: lax.transpose(xs[0], permutation))


def _iota(site: Site) -> Recipe:
    dim = site.op.params["dimension"]

    def emit(ctx, xs):
        shape = restricted_shape(site.value, site.roles, ctx.num_rows)
        role = site.roles.get(dim)
        index = ctx.indices(role, site.value.shape[dim]) if isinstance(role, Rows) else jnp.arange(shape[dim])
        return lax.broadcast_in_dim(index.astype(ctx.dtype(site.value.dtype)), shape, (dim,))

    return Recipe([], emit)


def _reshape(site: Site) -> Recipe:
    u = site.op.operands[0]
    roles: dict[int, Role] = {}
    for u_dims, v_dims in dimension_groups(u.shape, site.value.shape):
        roles.update(_group_roles(site, u, u_dims, v_dims))

    def emit(ctx, xs):
        return jnp.reshape(xs[0], restricted_shape(site.value, site.roles, ctx.num_rows))

    return Recipe([site.demand(u, roles)], emit)


def dimension_groups(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of equal size into the smallest runs of dimensions whose sizes multiply to the same number."""
    groups, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        a_dims, b_dims = ([i], []) if i < len(a) else ([], [j])
        i, j = i + len(a_dims), j + len(b_dims)
        size_a, size_b = math.prod(a[d] for d in a_dims), math.prod(b[d] for d in b_dims)
        if j < len(b) and not b_dims:
            b_dims, size_b, j = [j], b[j], j + 1
        while size_a != size_b and (i < len(a) or j < len(b)):
            if (size_a < size_b and i < len(a)) or j >= len(b):
                a_dims, size_a, i = [*a_dims, i], size_a * a[i], i + 1
            else:
                b_dims, size_b, j = [*b_dims, j], size_b * b[j], j + 1
        groups.append((a_dims, b_dims))
    return groups


def _group_roles(site: Site, u: Value, u_dims: list[int], v_dims: list[int]) -> dict[int, Role]:
    times = site.times
    u_time = [d for d in u_dims if d in times.dims(u)]
    v_time = [d for d in v_dims if d in times.dims(site.value)]
    if all(is_keys(site.roles[d]) for d in v_time):
        return dict.fromkeys(u_time, KEYS)
    if len(u_time) != 1 or len(v_time) != 1:
        raise _blocked(site)
    d, e = v_time[0], u_time[0]
    role = site.roles[d]
    if not isinstance(role, Rows):
        raise RuntimeError("a role is either keys or rows")
    v, at, ut = site.value.shape, v_dims.index(d), u_dims.index(e)
    outer = role.outer * math.prod(v[i] for i in v_dims[:at])
    inner = role.inner * math.prod(v[i] for i in v_dims[at + 1 :])
    before, after = math.prod(u.shape[i] for i in u_dims[:ut]), math.prod(u.shape[i] for i in u_dims[ut + 1 :])
    same_length = (v[d] // role.copies) * (outer // before) * (inner // after) == u.shape[e]
    if outer % before or inner % after or not same_length:
        raise _blocked(site)
    return {e: Rows(role.shift, outer // before, inner // after)}


def _blocked(site: Site) -> NotServable:
    """Names the operation that split time, which is not always the one that merges it again."""
    op, times = site.op, site.times
    while True:
        value = next((v for v in op.operands if times.dims(v) and times.is_dependent(v)), None)
        if value is None or value.op is None or all(times.extent(value, d).scale == 1 for d in times.dims(value)):
            break
        op = value.op
    return NotServable(
        "splits time into blocks, or merges two time axes; written token by token (a scan over time, or a map over "
        "queries) it would be servable",
        op,
        detail=f"{', '.join(times.describe(v) for v in op.operands)} -> {times.describe(op.results[0])}",
    )


def _stack(site: Site) -> Recipe:
    axis = site.op.params["axis"]
    roles = {d - (d > axis): role for d, role in site.roles.items()}
    return Recipe([site.demand(u, roles) for u in site.op.operands], lambda ctx, xs: ctx.bind(site, xs))


def _unstack(site: Site) -> Recipe:
    axis, u = site.op.params["axis"], site.op.operands[0]
    roles: dict[int, Role] = {d + (d >= axis): role for d, role in site.roles.items()}
    if axis in site.times.dims(u):
        roles[axis] = KEYS
    return Recipe([site.demand(u, roles)], lambda ctx, xs: ctx.bind(site, xs))


def _tile(site: Site) -> Recipe:
    reps = site.op.params["reps"]
    if any(n != 1 and site.is_rows(d) for d, n in enumerate(reps)):
        raise site.refuse("repeats the sequence along time")
    roles = {d: (KEYS if reps[d] != 1 else r) for d, r in site.roles.items()}
    roles.update({d: KEYS for d in site.times.dims(site.op.operands[0]) if d not in roles})
    return Recipe([site.demand(site.op.operands[0], roles)], lambda ctx, xs: ctx.bind(site, xs))


RULES = MappingProxyType(
    {
        "broadcast_in_dim": _broadcast,
        "transpose": _transpose,
        "iota": _iota,
        "reshape": _reshape,
        "squeeze": _reshape,
        "expand_dims": _reshape,
        "stack": _stack,
        "unstack": _unstack,
        "tile": _tile,
    }
)
