"""Convolution over time: each tap of row t reads one earlier row, so a causal convolution keeps a window of its
input."""

from __future__ import annotations

from types import MappingProxyType

import jax.numpy as jnp

from passes.incremental.plan import Recipe
from passes.incremental.roles import Rows
from passes.incremental.rules.movement import along
from passes.incremental.site import Site


def _conv_general_dilated(site: Site) -> Recipe:
    p, (u, w) = site.op.params, site.op.operands
    numbers = p["dimension_numbers"]
    dims = [
        i
        for i, (a, b) in enumerate(zip(numbers.lhs_spec, numbers.out_spec, strict=True))
        if a in site.times.dims(u) and site.is_rows(b)
    ]
    if len(dims) != 1 or dims[0] == 1 or site.times.dims(w):
        raise site.refuse("convolves time in a form that has no rule: time must be one batch or one spatial axis")
    if dims[0] == 0:
        roles = {numbers.lhs_spec[0]: site.roles[numbers.out_spec[0]]}
        return Recipe([site.demand(u, roles), site.all_keys(w)], lambda ctx, xs: ctx.bind(site, xs))
    return _causal(site, dims[0])


def _causal(site: Site, axis: int) -> Recipe:
    p, (u, w) = site.op.params, site.op.operands
    numbers, j = p["dimension_numbers"], axis - 2
    d, role = numbers.lhs_spec[axis], site.plain_rows(numbers.out_spec[axis])
    low, dilation, taps = p["padding"][j][0], p["rhs_dilation"][j], w.shape[numbers.rhs_spec[axis]]
    if p["window_strides"][j] != 1 or p["lhs_dilation"][j] != 1:
        raise site.refuse("strides over time")
    if site.times.short_params[site.op]["padding"][j][0] != low:
        raise site.refuse("pads time by an amount that depends on the length")
    shifts = [role.shift + low - i * dilation for i in range(taps)]
    in_front = max(site.times.extent(u, d).offset, 0)  # rows that padding may have put before the first token
    if min(shifts) < -in_front and site.is_dependent:
        raise site.refuse(
            f"row t of the convolution reads token t+{-min(shifts)}: it looks into the future; pad on the left"
        )

    def emit(ctx, xs):
        *rows, kernel = xs
        stacked = []
        for x, shift in zip(rows, shifts, strict=True):
            index = ctx.positions - shift
            stacked.append(jnp.where(along(d, x.ndim, (index >= 0) & (index < u.shape[d])), x, jnp.zeros((), x.dtype)))
        x = jnp.stack(stacked, d + 1)
        x = x.reshape(*x.shape[:d], -1, *x.shape[d + 2 :])

        def put(values, new):
            return tuple(new if i == j else old for i, old in enumerate(values))

        return ctx.bind(
            site,
            [x, kernel],
            padding=put(p["padding"], (0, 0)),
            window_strides=put(p["window_strides"], taps),
            rhs_dilation=put(p["rhs_dilation"], 1),
        )

    return Recipe([*(site.demand(u, {d: Rows(s)}) for s in shifts), site.all_keys(w)], emit)


RULES = MappingProxyType({"conv_general_dilated": _conv_general_dilated})
