"""One walk over the demands of a program, backwards from the logits: each is resolved into what it is made from.

The walk tells apart what depends on tokens from what depends on positions only (which can always be had whole), rows
of the new tokens from all rows so far (`keys`, cached at the cut), delayed rows (windows), and the meanings of a
loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from passes import replay
from passes.graph import Graph, Op, Value
from passes.incremental.errors import NotServable
from passes.incremental.plan import Frame, Loop, Node, Recipe
from passes.incremental.roles import KEYS, ROWS, Demand, Role, Rows
from passes.incremental.rules import DELAY_PASSES, POINTWISE, RULES
from passes.incremental.site import Site
from passes.incremental.state import State
from passes.incremental.tables import table, take
from passes.incremental.time import Times

_NO_RULE = {
    "while": "a while loop whose trip count is not known mixes tokens in a way that cannot be followed; use lax.scan",
    "shard_map": "shard_map inside the model hides what it does to tokens; write the forward without it",
    "pallas_call": "a Pallas kernel inside the model hides what it does to tokens; write its meaning in jnp",
}


@dataclass(eq=False)
class Walk:
    """One walk over the demands. Without `cuts` it collects what is wanted in all rows."""

    times: Times
    token_input: Value
    top: Frame
    cuts: dict[Graph, set[Value]] | None
    pending: list[tuple[Frame, Demand]] = field(default_factory=list)
    enclosing: dict[Frame, Frame] = field(default_factory=dict)
    ahead: dict[Demand, Op] = field(default_factory=dict)

    def run(self, frame: Frame, demands: list[Demand]) -> None:
        self.pending = [(frame, d) for d in reversed(demands)]
        while self.pending:
            frame, demand = self.pending.pop()
            if demand in frame.nodes:
                continue
            node = self.resolve(frame, demand)
            frame.nodes[demand] = node
            for operand in reversed(node.operands):
                self._note_ahead(demand, operand)
                self.pending.append((frame, operand))

    def _note_ahead(self, demand: Demand, operand: Demand) -> None:
        """Remembers which operation first asked for a row after the token's own."""
        if operand.shift < 0 and demand.value.op is not None:
            introduced = operand.shift < demand.shift or demand not in self.ahead
            op = demand.value.op if introduced and demand.shift >= 0 else self.ahead.get(demand, demand.value.op)
            self.ahead.setdefault(operand, op)

    # -- one demand
    def resolve(self, frame: Frame, demand: Demand) -> Node:
        value, op = demand.value, demand.value.op
        if value.const is not None:
            return Node([], table(value, self._by_dim(demand)))
        if not self.times.is_dependent(value):
            return self._resolve_positional(frame, demand)
        if demand.roles and not demand.wants_rows:
            return self._resolve_keys(frame, demand)
        if demand.wants_rows and demand.shift > 0 and not self._delay_passes(demand):
            return self._window(frame, demand)
        if op is None:
            if demand.shift < 0:
                raise self._refuse_ahead(demand)
            return self._resolve_input(frame, demand)
        if op.name == "scan":
            if demand.shift < 0:
                raise self._refuse_ahead(demand)
            return self._resolve_loop(frame, op, demand)
        return self._by_rule(frame, demand)

    def _by_dim(self, demand: Demand) -> dict[int, Role]:
        return dict(zip(self.times.dims(demand.value), demand.roles, strict=True))

    def site(self, frame: Frame, demand: Demand) -> Site:
        op = demand.value.op
        if op is None:
            raise RuntimeError("an input has no rule")
        return Site(op, demand.value, self._by_dim(demand), self.times, frame.over_time, _Keeper(self, frame))

    def _by_rule(self, frame: Frame, demand: Demand) -> Node:
        site = self.site(frame, demand)
        op, rule = site.op, RULES.get(site.op.name)
        if not any(self.times.dims(v) for v in (*op.operands, *op.results)):  # in a loop over time: of one token
            return self._whole(op, demand.value)
        if rule is None:
            raise site.refuse(
                _NO_RULE.get(op.name, f"there is no incremental rule for {op.name} on values that depend on tokens")
            )
        recipe = rule(site)
        return Node(recipe.operands, recipe.emit)

    def _resolve_positional(self, frame: Frame, demand: Demand) -> Node:
        """A value of positions and parameters only: by rule where there is one, else all rows, then the wanted ones."""
        value, op = demand.value, demand.value.op
        whole = Demand(value, (KEYS,) * len(demand.roles))
        if op is None:
            if frame.loop is not None:
                return self._resolve_input(frame, demand)
            return Node([], take(lambda ctx, xs: ctx.input(value), self._by_dim(demand), value))
        if demand == whole:
            operands = [Demand(u, (KEYS,) * len(self.times.dims(u))) for u in op.operands]
            return Node(operands, _replay(op, value.index))
        if op.name in RULES:
            try:
                return self._by_rule(frame, demand)
            except NotServable:
                pass  # rows cannot be had alone; position-only values can always be had whole
        return Node([whole], take(lambda ctx, xs: xs[0], self._by_dim(demand), value))

    # -- all rows of something that depends on tokens
    def _resolve_keys(self, frame: Frame, demand: Demand) -> Node:
        value, op = demand.value, demand.value.op
        if frame.over_time:
            return self._resolve_input(frame, demand) if op is None else self._whole(op, value)
        if len(demand.roles) > 1:
            raise NotServable("is needed for all pairs of cached tokens", op, detail=self.times.describe(value))
        if self.cuts is None:
            frame.keyed.setdefault(value)
            if self.times.has_own_rows(value):
                return Node([Demand(value, (ROWS,))])
            if op is None:
                return self._resolve_input(frame, demand)
            return self._whole(op, value)
        if value in self.cuts.get(frame.graph, ()):
            state = self._keep_rows(frame, value)
            return Node([Demand(value, (ROWS,))], lambda ctx, xs: ctx.cache(state, xs[0]))
        if op is None:
            return self._resolve_input(frame, demand)
        return self._whole(op, value)

    def _whole(self, op: Op, value: Value) -> Node:
        operands = [Demand(u, (KEYS,) * len(self.times.dims(u))) for u in op.operands]
        return Node(operands, _replay(op, value.index))

    def _keep_rows(self, frame: Frame, value: Value) -> State:
        (dim,) = self.times.dims(value)
        row = tuple(n for d, n in enumerate(value.shape) if d != dim)
        return self.keep(frame, State("kv", value, row, value.dtype, value.source, dim))

    def pulls_through(self, value: Value) -> bool:
        """Whether all rows of a value can be made of all rows of its operands at a cost linear in their number."""
        op = value.op
        if op is None or op.name == "scan" or op.name not in RULES:
            return False
        if not self.times.has_own_rows(value):
            return len(self.times.dims(value)) == 1
        site = Site(op, value, {self.times.dims(value)[0]: ROWS}, self.times, False, _no_keeping)
        try:
            recipe: Recipe = RULES[op.name](site)
        except (NotServable, _Keeps):
            return False
        dependent = [d for d in recipe.operands if self.times.is_dependent(d.value)]
        return all(isinstance(role, Rows) for d in dependent for role in d.roles) and all(d.roles for d in dependent)

    # -- delays
    def _delay_passes(self, demand: Demand) -> bool:
        op = demand.value.op
        if op is None:
            return False
        if len(demand.roles) > 1 or op.name in DELAY_PASSES:
            return True
        if op.name not in POINTWISE:
            return False
        (dim,) = self.times.dims(demand.value)
        belongs_later = self.times.extent(demand.value, dim).offset < 0  # as row i of x[1:] belongs to token i + 1
        return belongs_later or sum(map(self.times.is_dependent, op.operands)) == 1

    def _window(self, frame: Frame, demand: Demand) -> Node:
        value = demand.value
        (role,) = demand.roles
        if not isinstance(role, Rows) or role.copies != 1:
            raise NotServable("delays a dimension in which time is merged with other axes", value.op)
        (dim,) = self.times.dims(value)
        row = tuple(n for d, n in enumerate(value.shape) if d != dim)
        state = self.keep(frame, State("window", value, (role.shift, *row), value.dtype, value.source, dim))
        state.shape = (max(role.shift, state.shape[0]), *row)
        return Node([Demand(value, (ROWS,))], lambda ctx, xs: ctx.window(state, xs[0], role.shift))

    def keep(self, frame: Frame, state: State) -> State:
        """Registers state, once a kind and value.

        Raises:
          NotServable: the frame is the body of a loop over tokens.
        """
        if frame.over_time:
            raise NotServable("keeps state inside a loop over time", state.value.op)
        return frame.states.setdefault((state.kind, state.value), state)

    def _refuse_ahead(self, demand: Demand) -> NotServable:
        op = self.ahead.get(demand, demand.value.op)
        return NotServable(
            f"row t of the result needs token t+{-demand.shift}: it looks into the future",
            op,
            detail=f"reads {self.times.describe(demand.value)}",
        )

    # -- loops
    def _is_lead_time(self, op: Op) -> bool:
        return self.times.moves(op, "length")

    def _resolve_loop(self, frame: Frame, op: Op, demand: Demand) -> Node:
        num_carry, index = op.params["num_carry"], demand.value.index
        lead: Role | None = None
        roles = demand.roles
        if self._is_lead_time(op):
            if index < num_carry:
                if not demand.wants_rows and not frame.over_time:
                    raise self.site(frame, demand).refuse(
                        "the last state of a loop over all tokens is used, so early tokens would see later ones"
                    )
                lead = KEYS
            else:
                lead, roles = roles[0], roles[1:]
        if isinstance(lead, Rows):
            self._check_over_time(frame, op, lead)
        loop = frame.loops.get((op, lead))
        if loop is None:
            body = Frame(op.regions[0], over_time=frame.over_time or lead is not None)
            loop = frame.loops[op, lead] = body.loop = Loop(op, lead, body)
            self.enclosing[body] = frame
        self._want(loop, index, roles)
        return Node([], loop=loop)

    def _check_over_time(self, frame: Frame, op: Op, lead: Rows) -> None:
        if lead.copies != 1 or lead.shift:
            raise NotServable("is read at another token's row", op)
        if op.params["reverse"] and op.params["num_carry"]:
            raise NotServable("scans in reverse, from the last token backwards: early tokens would see later ones", op)
        if self.times.short_params[op]["length"] != self.times.short or op.params["length"] != self.times.long:
            raise NotServable(
                "scans blocks of time; scan token by token, or map over queries, and it can be served", op
            )
        if frame.over_time:
            raise NotServable("is a loop over time inside a loop over time", op)

    def _want(self, loop: Loop, index: int, roles: tuple[Role, ...]) -> None:
        if (index, roles) in loop.wanted:
            return
        loop.wanted[index, roles] = None
        body = loop.frame.graph
        self.pending.append((loop.frame, Demand(body.outputs[index], roles)))
        if index < loop.op.params["num_carry"]:
            operand = loop.op.operands[loop.op.params["num_consts"] + index]
            initial = loop.initial[index, roles] = Demand(operand, roles)
            self.pending.append((self.enclosing[loop.frame], initial))
            if isinstance(loop.lead, Rows):
                self._carry_over_time(loop, index, roles)

    def _carry_over_time(self, loop: Loop, index: int, roles: tuple[Role, ...]) -> None:
        value = loop.frame.graph.outputs[index]
        if roles and self.times.is_dependent(value):
            raise NotServable(
                "keeps a cache of tokens inside a loop over time", loop.op, detail=self.times.describe(value)
            )
        state = State("carry", value, value.shape, value.dtype, loop.op.source)
        loop.carries[index, roles] = self.keep_for(loop, index, roles, state)

    def keep_for(self, loop: Loop, index: int, roles: tuple[Role, ...], state: State) -> State:
        """Registers the carry of a loop over time in the frame around it."""
        return self.enclosing[loop.frame].states.setdefault(("carry", (loop.op, index, roles)), state)

    def _resolve_input(self, frame: Frame, demand: Demand) -> Node:
        value = demand.value
        loop = frame.loop
        if loop is None:
            if value is not self.token_input:
                raise RuntimeError("only the tokens are a token-dependent input")
            return Node([], lambda ctx, xs: ctx.tokens)
        position = frame.graph.inputs.index(value)
        num_consts, num_carry = loop.op.params["num_consts"], loop.op.params["num_carry"]
        operand = loop.op.operands[position]
        outer = self.enclosing[frame]
        if num_consts <= position < num_consts + num_carry:
            if isinstance(loop.lead, Rows) and demand.roles and self.times.is_dependent(value):
                raise NotServable("keeps a cache of tokens inside a loop over time", loop.op)
            self._want(loop, position - num_consts, demand.roles)
        else:
            lead = ()
            if position >= num_consts and self.times.dims(operand)[:1] == (0,) and self._is_lead_time(loop.op):
                lead = (loop.lead if loop.lead is not None else KEYS,)
            source = Demand(operand, (*lead, *demand.roles))
            loop.sources[demand] = source
            self.pending.append((outer, source))
        return Node([], lambda ctx, xs: ctx.loop_input(demand))


class _Keeps(Exception):
    """Raised in place of keeping state, when a rule is only asked what it would read."""


def _no_keeping(*_: Any) -> State:
    raise _Keeps


@dataclass(frozen=True)
class _Keeper:
    walk: Walk
    frame: Frame

    def __call__(self, kind: Any, value: Value, shape: tuple[int, ...], time_dim: int) -> State:
        return self.walk.keep(self.frame, State(kind, value, shape, value.dtype, value.source, time_dim))


def _replay(op: Op, index: int) -> Callable[..., Any]:
    return lambda ctx, xs: replay.apply_op(op, xs, ctx.widening)[index]
