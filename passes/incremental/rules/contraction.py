"""Operations that combine the entries of an axis: products, reductions, sorting. An axis of time that is combined is
wanted whole (`keys`); the result must keep a query axis, or early tokens would see later ones.
"""

from __future__ import annotations

from types import MappingProxyType

from passes.incremental.plan import Recipe
from passes.incremental.roles import KEYS, Role
from passes.incremental.site import Site

_REDUCE = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()


def _dot_general(site: Site) -> Recipe:
    (left_c, right_c), (left_b, right_b) = site.op.params["dimension_numbers"]
    left, right = site.op.operands
    left_roles: dict[int, Role | None] = {}
    right_roles: dict[int, Role | None] = {}
    out = 0
    for a, b in zip(left_b, right_b, strict=True):
        left_roles[a] = right_roles[b] = site.roles.get(out)
        out += 1
    for operand, roles, taken in ((left, left_roles, {*left_c, *left_b}), (right, right_roles, {*right_c, *right_b})):
        for d in range(len(operand.shape)):
            if d not in taken:
                roles[d] = site.roles.get(out)
                out += 1
    for a, b in zip(left_c, right_c, strict=True):
        left_roles[a] = right_roles[b] = KEYS
    if set(left_c) & set(site.times.dims(left)):
        site.require_query_axis()
    return Recipe([site.demand(left, left_roles), site.demand(right, right_roles)], lambda ctx, xs: ctx.bind(site, xs))


def _reduce(site: Site) -> Recipe:
    u, axes = site.op.operands[0], site.op.params["axes"]
    kept = [d for d in range(len(u.shape)) if d not in axes]
    roles: dict[int, Role | None] = {d: site.roles.get(o) for o, d in enumerate(kept)}
    roles.update(dict.fromkeys(axes, KEYS))
    if set(axes) & set(site.times.dims(u)):
        site.require_query_axis()
    return Recipe([site.demand(u, roles)], lambda ctx, xs: ctx.bind(site, xs))


def _top_k(site: Site) -> Recipe:
    u = site.op.operands[0]
    axis = site.op.params.get("axis", len(u.shape) - 1) % len(u.shape)
    if axis in site.times.dims(u):
        site.require_query_axis()
    return Recipe([site.demand(u, {**site.roles, axis: KEYS})], lambda ctx, xs: ctx.bind(site, xs))


def _sort(site: Site) -> Recipe:
    axis = site.op.params["dimension"]
    if site.is_rows(axis):
        raise site.refuse(
            "sorts tokens along time and keeps them in sorted order, as an expert dispatch by sorting does"
        )
    return Recipe([site.same(u) for u in site.op.operands], lambda ctx, xs: ctx.bind(site, xs))


def _fft(site: Site) -> Recipe:
    last = len(site.value.shape) - len(site.op.params["fft_lengths"])
    u = site.op.operands[0]
    if any(d >= last for d in (*site.times.dims(u), *site.times.dims(site.value))):
        raise site.refuse(
            "a Fourier transform over time mixes every token with every other; a causal convolution written "
            "with jax.lax.conv_general_dilated, or a scan, would be servable"
        )
    return Recipe([site.same(u)], lambda ctx, xs: ctx.bind(site, xs))


RULES = MappingProxyType(
    {**dict.fromkeys(_REDUCE, _reduce), "dot_general": _dot_general, "top_k": _top_k, "sort": _sort, "fft": _fft}
)
