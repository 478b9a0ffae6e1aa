"""Running sums, products, maxima and associative scans over time: the last row is carried to the next step."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from passes import replay
from passes.incremental.plan import Recipe
from passes.incremental.roles import Rows
from passes.incremental.site import Site, restricted_shape
from passes.ops import associative_scan

_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "cumsum": lax.add,
    "cumprod": lax.mul,
    "cummax": lax.max,
    "cummin": lax.min,
    "cumlogsumexp": jnp.logaddexp,
}


def _check(site: Site, axis: int) -> None:
    role = site.plain_rows(axis)
    if role.shift < 0:
        raise site.refuse("is read beyond the token's own row: it looks into the future")
    if site.op.params["reverse"]:
        raise site.refuse("accumulates in reverse, from the last token backwards: early tokens would see later ones")


def _carry(ctx: Any, state: Any, rows: Any, axis: int, joined: Callable[[Any], Any]) -> Any:
    """Joins the carried row to the new ones and carries the last valid row on.

    `rows` accumulate from the first new token; a request that starts (nothing cached yet) has nothing to join.
    """
    old = ctx.read(state)
    y = jnp.where(ctx.start == 0, rows, joined(old).astype(rows.dtype))
    last = lax.dynamic_slice_in_dim(y, jnp.maximum(ctx.count - 1, 0), 1, axis=axis)
    ctx.write(state, jnp.where(ctx.count > 0, last, old))
    return y


def _cumulative(site: Site) -> Recipe:
    axis, u = site.op.params["axis"], site.op.operands[0]
    if not site.is_rows(axis):
        return Recipe([site.same(u)], lambda ctx, xs: ctx.bind(site, xs))
    _check(site, axis)
    shape = list(restricted_shape(site.value, site.roles, 1))
    state = site.keep("carry", site.value, tuple(shape), axis)

    def emit(ctx, xs):
        rows = ctx.bind(site, xs)
        return _carry(ctx, state, rows, axis, lambda old: _COMBINE[site.op.name](old, rows))

    return Recipe([site.same(u)], emit)


def _associative_scan(site: Site) -> Recipe:
    p = site.op.params
    num_consts, axes = p["num_consts"], p["axes"]
    axis = axes[site.value.index]
    consts, elems = site.op.operands[:num_consts], site.op.operands[num_consts:]
    if not site.is_rows(axis):
        raise site.refuse("is wanted for all cached tokens at once")
    _check(site, axis)
    demands = [site.all_keys(c) for c in consts]
    states = []
    for i, (u, a) in enumerate(zip(elems, axes, strict=True)):
        if site.times.dims(u) != (a,):
            raise site.refuse("scans elements that have another time axis")
        demands.append(site.demand(u, {a: Rows()}))
        shape = tuple(1 if d == a else n for d, n in enumerate(u.shape))
        states.append(site.keep("carry", site.op.results[i], shape, a))

    def emit(ctx, xs):
        body = site.op.regions[0]

        def combine(*flat):
            return replay.evaluate(body, [*xs[:num_consts], *flat], ctx.widening)

        rows = associative_scan.run(combine, xs[num_consts:], axes, reverse=False)
        before = [ctx.read(s) for s in states]
        joined = _join(combine, before, rows, axes)
        out = [_carry(ctx, s, r, a, lambda _, j=j: j) for s, r, a, j in zip(states, rows, axes, joined, strict=True)]
        return out[site.value.index]

    return Recipe(demands, emit)


def _join(combine: Callable[..., Any], before: list[Any], rows: list[Any], axes: tuple[int, ...]) -> list[Any]:
    """Combines the carried element with each new row."""
    squeezed = [lax.squeeze(b, (a,)) for b, a in zip(before, axes, strict=True)]
    moved = [jnp.moveaxis(r, a, 0) for r, a in zip(rows, axes, strict=True)]

    def one(*row: Any) -> list[Any]:
        spread = [jnp.expand_dims(x, a) for x, a in zip((*squeezed, *row), (*axes, *axes), strict=True)]
        return [lax.squeeze(y, (a,)) for y, a in zip(combine(*spread), axes, strict=True)]

    return [jnp.moveaxis(y, 0, a) for y, a in zip(jax.vmap(one)(*moved), axes, strict=True)]


RULES = MappingProxyType({**dict.fromkeys(_COMBINE, _cumulative), "associative_scan": _associative_scan})
