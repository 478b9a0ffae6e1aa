"""Reads and writes at computed indices: gather, scatter, dynamic_update_slice, beside time or into all the keys."""

from __future__ import annotations

from types import MappingProxyType

from passes.incremental.plan import Recipe
from passes.incremental.roles import KEYS, Role, Rows
from passes.incremental.rules.own_position import own_position_dim
from passes.incremental.site import Site


def _gather(site: Site) -> Recipe:
    numbers = site.op.params["dimension_numbers"]
    u, index = site.op.operands
    out_batch = [d for d in range(len(site.value.shape)) if d not in numbers.offset_dims]
    index_roles: dict[int, Role | None] = {i: site.roles.get(d) for i, d in enumerate(out_batch)}
    kept = [
        d
        for d in range(len(u.shape))
        if d not in numbers.collapsed_slice_dims and d not in numbers.operand_batching_dims
    ]
    roles: dict[int, Role | None] = {d: site.roles.get(o) for d, o in zip(kept, numbers.offset_dims, strict=True)}
    for d, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        roles[d] = index_roles[i]
    roles.update(dict.fromkeys(numbers.start_index_map, KEYS))
    if site.is_dependent and set(site.times.dims(u)) & set(numbers.start_index_map) and site.times.is_dependent(u):
        site.require_query_axis()

    def emit(ctx, xs):
        sizes = list(site.op.params["slice_sizes"])
        for d in site.times.dims(u):
            if d in kept and d not in numbers.start_index_map:
                sizes[d] = xs[0].shape[d]
        return ctx.bind(site, xs, slice_sizes=tuple(sizes))

    return Recipe([site.demand(u, roles), site.demand(index, index_roles)], emit)


def _scatter(site: Site) -> Recipe:
    numbers = site.op.params["dimension_numbers"]
    u, index, updates = site.op.operands
    kept = [
        d
        for d in range(len(u.shape))
        if d not in numbers.inserted_window_dims and d not in numbers.operand_batching_dims
    ]
    window = dict(zip(numbers.update_window_dims, kept, strict=True))
    batch = dict(zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    along_time = set(site.times.dims(u)) & set(numbers.scatter_dims_to_operand_dims)
    own_rows: dict[int, Rows] = {}  # components of the index that name the row they write to
    for d in along_time:
        if site.is_rows(d):
            component = numbers.scatter_dims_to_operand_dims.index(d)
            dim = own_position_dim(index, component)
            if dim is None:
                raise site.refuse("writes at computed tokens, as a dispatch by index does")
            batch[dim], own_rows[component] = d, site.plain_rows(d)
    beside = set(site.times.dims(index)) - set(batch)
    if beside and not _all_keys(site):
        raise site.refuse("writes at computed tokens, as a dispatch by index does")
    # The dimensions of updates that are no window are those of the index, in order, its last one left out.
    spread = [d for d in range(len(updates.shape)) if d not in window]
    of_result = {**window, **{d: batch[i] for i, d in enumerate(spread) if i in batch}}
    update_roles = {d: site.roles.get(of_result.get(d, -1), KEYS) for d in range(len(updates.shape))}
    index_roles = {d: site.roles.get(batch.get(d, -1), KEYS) for d in range(len(index.shape))}

    def emit(ctx, xs):
        operand, at, new = xs
        for component, role in own_rows.items():
            at = at.at[..., component].add(role.shift - ctx.start)  # rows count from the first new token
        return ctx.bind(site, [operand, at, new])

    return Recipe([site.same(u), site.demand(index, index_roles), site.demand(updates, update_roles)], emit)


def _dynamic_update_slice(site: Site) -> Recipe:
    u, update, *starts = site.op.operands
    for d in site.times.dims(u):
        if site.is_rows(d) and (update.shape[d] != u.shape[d]):
            raise site.refuse("writes at computed tokens")
    return Recipe(
        [site.same(u), site.same(update), *(site.all_keys(s) for s in starts)], lambda ctx, xs: ctx.bind(site, xs)
    )


def _all_keys(site: Site) -> bool:
    return not any(site.is_rows(d) for d in site.roles)


_SCATTERS = tuple("scatter scatter-add scatter_add scatter_sub scatter-mul scatter_mul scatter_min scatter_max".split())

RULES = MappingProxyType(
    {"gather": _gather, **dict.fromkeys(_SCATTERS, _scatter), "dynamic_update_slice": _dynamic_update_slice}
)
