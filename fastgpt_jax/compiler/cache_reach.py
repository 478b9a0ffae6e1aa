"""How far back the steps of a program read each of its caches.

Knows no engine. The one idea: rows that no mask lets be seen any more need not be kept. Where everything that reads a
cache is attention, row by row, over a band of keys around the query and some first ones, the band says how long a row
may matter. The answer may be too long and is never too short: a cache of which anything else is read is read whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fastgpt_jax.artifact.cache_layout import Reach
from fastgpt_jax.compiler.program import Program
from fastgpt_jax.sampling.step_io import StepInputs
from passes.attention.rewrite import attention
from passes.graph import Graph, Op, Value
from passes.reader import trace
from passes.regions import Role, slots
from passes.registry import Pass
from passes.simplify import simplify
from passes.sparse_attention.query_positions import decompose_at
from passes.sparse_attention.rows import Demand, NotByRows, RowProgram
from passes.sparse_attention.support import find_support

NUM_QUERIES = 3
"""Of the step that is looked at; with several, a mask compares their index with that of the keys."""


def cache_reach(program: Program, params: Sequence[Any], sparse: Sequence[Pass] = ()) -> tuple[Reach | None, ...]:
    """The reach of each cache of rows, in their order; None where all rows may be read.

    Args:
      params: Shapes of the parameters, in the order of the graph's inputs.
      sparse: Passes that lay masks over the attention of the program.
    """
    if not program.kv_states:
        return ()
    graph, pools = _step(program, params)
    simplify(graph)
    attention(graph)
    for entry in sparse:
        entry.function(graph, None)
    found = _Reaches(graph)
    return tuple(_together(found.of(graph.inputs[place]) for place in places) for places in pools)


def _step(program: Program, params: Sequence[Any]) -> tuple[Graph, list[list[int]]]:
    """A step of the model for one request, and which inputs of it are the pools of each cache."""
    tokens, one = jax.ShapeDtypeStruct((NUM_QUERIES,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    pages = jax.ShapeDtypeStruct((1, program.layout().pages_per_request(program.plan.capacity)), jnp.int32)
    state = jax.eval_shape(program.init_state)
    leaves, tree = jax.tree.flatten(state)

    def step(params: Any, state: list[Any], tokens: Any, num_new: Any, pages: Any, cache_len: Any, slots: Any) -> Any:
        inputs = StepInputs(tokens, num_new, pages, cache_len, slots, tokens)
        logits, _, after = program.logits(params, jax.tree.unflatten(tree, state), inputs, last_row=False)
        return [logits, *jax.tree.leaves(after)]

    graph, _ = trace(step, list(params), leaves, tokens, one, pages, one, one)
    places, start = [], len(params)
    for pool in state.pools:
        size = len(jax.tree.leaves(pool))
        places.append(list(range(start, start + size)))
        start += size
    return graph, places


def _together(reaches: Iterable[Reach | None]) -> Reach | None:
    """What holds for arrays that share their rows."""
    total = Reach(1)
    for reach in reaches:
        if reach is None:
            return None
        total |= reach
    return total


class _Reaches:
    """What a graph reads of its pools."""

    def __init__(self, graph: Graph):
        self._uses: dict[Value, list[Reach | None]] = {}
        self._below: dict[Value, list[Value]] = {}
        self._collect(graph)

    def of(self, pool: Value) -> Reach | None:
        """Of a pool that comes in, in all states that it goes through."""
        reaches, todo, seen = [], [pool], set[Value]()
        while todo:
            value = todo.pop()
            if value not in seen:
                seen.add(value)
                reaches += self._uses.get(value, ())
                todo += self._below.get(value, ())
        return _together(reaches)

    def _collect(self, graph: Graph) -> None:
        users = graph.users()
        for op in graph.ops:
            if op.name == "kv_update_read":
                self._below.setdefault(op.operands[0], []).append(op.results[1])
                self._uses.setdefault(op.operands[0], []).append(_reach(op, graph, users))
            elif op.name in ("scan", "while"):
                for slot in slots(op):
                    self._below.setdefault(slot.operand, []).extend(value for _, value in slot.inputs)
                for slot, result in _carries(op):
                    self._below.setdefault(slot, []).append(result)
                for region in op.regions:
                    self._collect(region)
            else:
                for operand in op.operands:
                    self._uses.setdefault(operand, []).append(None)


def _carries(op: Op) -> list[tuple[Value, Value]]:
    """What goes into a loop, and what comes out in its place."""
    carried = [slot.operand for slot in slots(op) if slot.role is Role.CARRY]
    return list(zip(carried, op.results, strict=False))


def _reach(op: Op, graph: Graph, users: dict[Value, list[Op]]) -> Reach | None:
    """How far back the rows lie that are used of what an operation reads; None where they may lie anywhere."""
    attentions: dict[Op, None] = {}
    todo, seen = [op.results[0]], set[Value]()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if any(value is output for output in graph.outputs):
            return None
        for user in users.get(value, ()):
            if user.name == "attention":
                attentions[user] = None
            elif user.regions or user.name == "kv_update_read":
                return None
            else:
                todo += user.results
    if op.params["length"] is None:
        return None
    return _together(_reach_of_attention(user, op, seen) for user in attentions)


def _reach_of_attention(user: Op, cache: Op, made_of_it: set[Value]) -> Reach | None:
    form = decompose_at(user)
    support = None if form is None else find_support(form.mask)
    leaves = user.operands[3 : 3 + user.params["num_leaves"]]
    along_keys = {i for i, value in enumerate(leaves, start=3) if value.shape[3] > 1}
    if support is None:
        return None
    program = RowProgram()
    try:
        for place, value in enumerate(user.operands):
            if place not in (1, 2, *along_keys):
                if value in made_of_it:
                    return None
                continue
            batch = 0 if place < 3 or value.shape[0] > 1 else None
            program.add(Demand(value, batch, 1 if place < 3 else 3))
    except NotByRows:
        return None
    if program.reads_all():
        return None
    fixed = [demand.fixed[1] for demand in program.reads.get(cache, ()) if demand.fixed is not None]
    ends = [end for _, end in support.ranges]
    window = 1 if support.band is None else max(1 + support.band[1], 1)
    return Reach(window, max([*fixed, *ends], default=0))
