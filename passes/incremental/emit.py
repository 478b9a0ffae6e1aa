"""Runs a plan as a JAX function of one request; mapped over requests it is the serving step.

The pools of cached rows belong to all requests and go in and out whole; windows and carries belong to one. Positions
past `count` are padding: they are computed and never kept. Rows of a cache that no token has written yet are read as
row 0, so that whatever the memory held (even NaN) cannot leak through a masked product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from passes import compat, replay
from passes.graph import Value
from passes.incremental.plan import Frame, Loop, Plan
from passes.incremental.roles import Demand, Keys, Rows
from passes.incremental.row_format import RowFormat
from passes.incremental.site import Site, restricted_shape
from passes.incremental.state import State
from passes.ops.kv_update_read import kv_update_read
from passes.replay import SAME, Widening


@dataclass
class Request:
    """One request's part of a step.

    Attributes:
      tokens: i32 [T], padded.
      start: i32 scalar, tokens cached before this step.
      count: i32 scalar, how many of `tokens` are valid.
      pages: i32 [M], the request's pages in order.
    """

    tokens: Any
    start: Any
    count: Any
    pages: Any


@dataclass(eq=False)
class Memory:
    """State during a step: pools by kv state; windows and carries as they were and as they become."""

    pools: dict[State, Any]
    before: dict[State, Any]
    after: dict[State, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What emitting functions may ask of the step."""

    plan: Plan
    inputs: dict[Value, Any]
    request: Request
    memory: Memory
    widening: Widening
    unroll: bool
    row_format: RowFormat | None = None
    layers: tuple[Any, ...] = ()
    loop_inputs: dict[Demand, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """New tokens, padding included."""
        return self.request.tokens.shape[0]

    @property
    def start(self) -> Any:
        return self.request.start

    @property
    def count(self) -> Any:
        return self.request.count

    @property
    def positions(self) -> Any:
        """Positions of the new tokens, i32 [T]."""
        return self.request.start + jnp.arange(self.num_rows, dtype=jnp.int32)

    @property
    def tokens(self) -> Any:
        return self.request.tokens[None]

    def dtype(self, dtype: Any) -> Any:
        return self.widening.dtype(dtype)

    def indices(self, role: Rows, size: int) -> Any:
        return role.indices(self.positions, size)

    def input(self, value: Value) -> Any:
        return self.inputs[value]

    def constant(self, value: Value) -> Any:
        return self.widening.array(jnp.asarray(value.const))

    def loop_input(self, demand: Demand) -> Any:
        return self.loop_inputs[demand]

    def bind(self, site: Site, operands: Sequence[Any], **overrides: Any) -> Any:
        """Applies a rule's operation to restricted operands, some parameters replaced."""
        if site.op.regions:
            return replay.apply_op(site.op, operands, self.widening)[site.value.index]
        params = self.widening.params({**site.op.params, **overrides})
        if self.widening.wide is not None and site.op.name == "reduce_precision":
            return operands[0]
        return compat.bind(site.op.primitive, operands, params)[site.value.index]

    # -- state
    def cache(self, state: State, rows: Any) -> Any:
        """Stores the new rows of a cached value and returns all its rows at capacity."""
        rows = jnp.moveaxis(rows, state.time_dim, 0)
        valid = jnp.arange(self.num_rows) < self.count
        positions = jnp.where(valid, self.positions, jnp.iinfo(jnp.int32).max)
        length = state.value.shape[state.time_dim]
        view = self._write_and_read(state, rows, positions, length)
        written = jnp.arange(length) < self.start + self.count
        view = jnp.where(written.reshape(-1, *[1] * (view.ndim - 1)), view, view[:1])
        return jnp.moveaxis(view, 0, state.time_dim)

    def _write_and_read(self, state: State, rows: Any, positions: Any, length: int) -> Any:
        """Rows into the pools of a state, and the first `length` rows out of them."""

        def through(pool: Any, rows: Any) -> tuple[Any, Any]:
            return kv_update_read(pool, self.layers, rows, positions, self.request.pages, length=length)

        if self.row_format is None or not self.row_format.holds(state):
            view, self.memory.pools[state] = through(self.memory.pools[state], rows)
            return view
        qvalue, scale = self.row_format.pack(rows)
        pool, scale_pool = self.memory.pools[state]
        view, pool = through(pool, qvalue)
        scale_view, scale_pool = through(scale_pool, scale)
        self.memory.pools[state] = pool, scale_pool
        return self.row_format.unpack(view, scale_view, rows.dtype)

    def window(self, state: State, rows: Any, shift: int) -> Any:
        """The rows `shift` tokens before the new ones, from a window of the last rows, which moves on."""
        rows, size = jnp.moveaxis(rows, state.time_dim, 0), state.shape[0]
        old = jnp.where(self.start == 0, jnp.zeros((), rows.dtype), self.read(state))
        both = jnp.concatenate([old, rows])
        self.write(state, lax.dynamic_slice_in_dim(both, self.count, size, axis=0))
        return jnp.moveaxis(both[size - shift : size - shift + self.num_rows], 0, state.time_dim)

    def read(self, state: State) -> Any:
        return self.memory.before[state]

    def write(self, state: State, new: Any) -> None:
        self.memory.after[state] = new


def run(
    plan: Plan,
    inputs: dict[Value, Any],
    request: Request,
    pools: dict[State, Any],
    own: dict[State, Any],
    *,
    last_row: bool = False,
    widening: Widening = SAME,
    unroll: bool = False,
    row_format: RowFormat | None = None,
) -> tuple[Any, Any, dict[State, Any], dict[State, Any]]:
    """Runs the step for one request.

    Args:
      inputs: Arrays for the graph inputs other than the tokens.
      pools: For each kv state `[*lead, P, Z, *row]`, or such a pool of rows and one of scales.
      own: For each window and carry its array `[*lead, *shape]`.
      last_row: Make the logits of the last valid row only; what comes before the vocabulary projection is made for all.
      unroll: Write layer loops out instead of scanning (faster on CPU).
      row_format: How rows of caches are stored; None as they are.

    Returns: The first output in the rows of the new tokens (or the last), what its last product reads in the last valid
      row, flat (empty where there is no such product), the pools, and the request's own state.
    """
    memory = Memory(dict(pools), dict(own), dict(own))
    wide = {v: widening.array(x) for v, x in inputs.items()}
    context = Context(plan, wide, request, memory, widening, unroll, row_format)
    if last_row:
        out, row = _last_row(context)
    else:
        out, hidden = run_frame(context, plan.frame, plan.order[plan.frame], [plan.output, plan.hidden])
        row = _last_valid(context, hidden)
    row = row.reshape(-1) if plan.head else jnp.zeros(0, row.dtype)
    return out, row, memory.pools, {s: memory.after[s] for s in own}


def _last_row(ctx: Context) -> tuple[Any, Any]:
    """The logits of the last valid row, and that row of the hidden values, from which alone they are made."""
    plan = ctx.plan
    order = plan.frame.order([plan.hidden])
    (hidden,) = run_frame(ctx, plan.frame, order, [plan.hidden])
    row = _last_valid(ctx, hidden)
    if not plan.head:
        return row, row
    last = jnp.maximum(ctx.count - 1, 0)
    token = lax.dynamic_slice_in_dim(ctx.request.tokens, last, 1)
    request = Request(token, ctx.start + last, jnp.ones_like(ctx.count), ctx.request.pages)
    (logits,) = run_frame(replace(ctx, request=request), plan.frame, plan.head, [plan.output], {plan.hidden: row})
    return logits, row


def _last_valid(ctx: Context, hidden: Any) -> Any:
    """The last valid row of the hidden values."""
    (dim,) = ctx.plan.times.dims(ctx.plan.hidden.value)
    return lax.dynamic_slice_in_dim(hidden, jnp.maximum(ctx.count - 1, 0), 1, axis=dim)


def run_frame(
    ctx: Context,
    frame: Frame,
    order: Sequence[Demand],
    outputs: Sequence[Demand],
    given: dict[Demand, Any] | None = None,
) -> list[Any]:
    """Makes the demands of a frame in order; returns those asked for."""
    made: dict[Demand, Any] = dict(given or {})
    loops: dict[Loop, dict[Any, Any]] = {}
    for demand in order:
        node = frame.nodes[demand]
        if node.loop is not None:
            if node.loop not in loops:
                loops[node.loop] = run_loop(ctx, node.loop, made)
            made[demand] = loops[node.loop][_loop_key(node.loop, demand)]
        elif node.emit is not None:
            with compat.source_scope(demand.value.source.frames):
                made[demand] = node.emit(ctx, [made[d] for d in node.operands])
            _check_shape(ctx, demand, made[demand])
    return [made[d] for d in outputs]


def _check_shape(ctx: Context, demand: Demand, x: Any) -> None:
    roles = dict(zip(ctx.plan.times.dims(demand.value), demand.roles, strict=True))
    want = restricted_shape(demand.value, roles, ctx.num_rows)
    if tuple(x.shape) != want:
        raise RuntimeError(f"{demand.value.op} in roles {demand.roles} gave {tuple(x.shape)}, not {want}")


def _loop_key(loop: Loop, demand: Demand) -> tuple[int, tuple[Any, ...]]:
    index = demand.value.index
    timed = loop.lead is not None and index >= loop.op.params["num_carry"]
    return index, demand.roles[1:] if timed else demand.roles


def run_loop(ctx: Context, loop: Loop, made: dict[Demand, Any]) -> dict[tuple[int, tuple[Any, ...]], Any]:
    """Runs a loop: over layers with state stacked, over the new tokens with carried state, or over the keys."""
    num_consts, num_carry = loop.op.params["num_consts"], loop.op.params["num_carry"]
    position = {v: i for i, v in enumerate(loop.frame.graph.inputs)}
    consts = {d: made[s] for d, s in loop.sources.items() if position[d.value] < num_consts}
    scan_inputs = [d for d in loop.sources if position[d.value] >= num_consts + num_carry]
    scanned = [made[loop.sources[d]] for d in scan_inputs]
    carried = [key for key in loop.wanted if key[0] < num_carry]
    stacked = [key for key in loop.wanted if key[0] >= num_carry]
    initial = [made[loop.initial[key]] for key in carried]
    inputs = loop.frame.graph.inputs
    carry_inputs = [Demand(inputs[num_consts + j], roles) for j, roles in carried]
    outputs = [Demand(loop.frame.graph.outputs[j], roles) for j, roles in loop.wanted]

    def body(inner: Context, carry: Sequence[Any], xs: Sequence[Any]) -> dict[Any, Any]:
        given = zip([*carry_inputs, *scan_inputs], [*carry, *xs], strict=True)
        inner.loop_inputs = {**consts, **dict(given)}
        return dict(zip(loop.wanted, run_frame(inner, loop.frame, ctx.plan.order[loop.frame], outputs), strict=True))

    if loop.lead is None:
        final, ys = _over_layers(ctx, loop, body, carried, stacked, initial, scanned)
    elif isinstance(loop.lead, Keys):
        final, ys = _over_keys(ctx, loop, body, carried, stacked, initial, scanned)
    else:
        final, ys = _over_rows(ctx, loop, body, carried, stacked, initial, scanned)
    return {**dict(zip(carried, final, strict=True)), **dict(zip(stacked, ys, strict=True))}


Body = Callable[[Context, Sequence[Any], Sequence[Any]], dict[Any, Any]]


def _over_keys(ctx, loop: Loop, body: Body, carried, stacked, initial, scanned):
    def step(carry, xs):
        out = body(replace(ctx), carry, xs)
        return [out[k] for k in carried], [out[k] for k in stacked]

    p = loop.op.params
    return lax.scan(step, initial, scanned, length=p["length"], reverse=p["reverse"])


def _over_rows(ctx, loop: Loop, body: Body, carried, stacked, initial, scanned):
    """Token by token. A request that starts takes the loop's initial values; padding does not move the state."""
    states = [loop.carries[k] for k in carried]
    old = [jnp.where(ctx.start == 0, a, ctx.read(s)) for a, s in zip(initial, states, strict=True)]

    def step(carry, x):
        i, xs = x
        out = body(replace(ctx), carry, xs)
        kept = [jnp.where(i < ctx.count, out[k], c) for k, c in zip(carried, carry, strict=True)]
        return kept, [out[k] for k in stacked]

    final, ys = lax.scan(step, old, (jnp.arange(ctx.num_rows), scanned), length=ctx.num_rows)
    for state, value in zip(states, final, strict=True):
        ctx.write(state, value)
    return final, ys


def _over_layers(ctx, loop: Loop, body: Body, carried, stacked, initial, scanned):
    """Layer by layer: pools ride in the carry and are indexed by layer, windows and carries are scanned."""
    states = loop.frame.all_states()
    pools = [s for s in states if s.kind == "kv"]
    own = [s for s in states if s.kind != "kv"]
    p = loop.op.params
    length = p["length"]

    def step(carry, x):
        values, held = carry
        layer, xs, before = x
        memory = Memory(
            {**ctx.memory.pools, **dict(zip(pools, held, strict=True))}, dict(zip(own, before, strict=True))
        )
        memory.after = dict(memory.before)
        inner = replace(ctx, memory=memory, layers=(*ctx.layers, layer))
        out = body(inner, values, xs)
        return (
            ([out[k] for k in carried], [memory.pools[s] for s in pools]),
            ([out[k] for k in stacked], [memory.after[s] for s in own]),
        )

    start = (initial, [ctx.memory.pools[s] for s in pools])
    over = (jnp.arange(length, dtype=jnp.int32), scanned, [ctx.memory.before[s] for s in own])
    run_scan = _unrolled if ctx.unroll else _scanned
    (final, held), (ys, after) = run_scan(step, start, over, length, p["reverse"])
    ctx.memory.pools.update(zip(pools, held, strict=True))
    ctx.memory.after.update(zip(own, after, strict=True))
    return final, ys


def _scanned(step, start, over, length, reverse):
    return lax.scan(step, start, over, length=length, reverse=reverse)


def _unrolled(step, start, over, length, reverse):
    """The loop written out; what is scanned is sliced at constant places."""
    carry, ys = start, [None] * length
    for i in reversed(range(length)) if reverse else range(length):
        carry, ys[i] = step(carry, jax.tree.map(lambda x, i=i: x[i], over))
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)
