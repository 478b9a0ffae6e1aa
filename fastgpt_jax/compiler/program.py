"""The serving step of a derived plan: rows mapped over pages, state in and out, sampling behind the logits.

A step has R rows with T / R new tokens each. The plan runs for one row; `vmap` makes the batch, with the pools of
cached rows shared by all: of every cached value all rows are written before any is read, so that rows at consecutive
positions of one request see each other as chunks in steps of their own would.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fastgpt_jax.artifact.cache_layout import CacheEntry, CacheLayout, Reach
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling import full, greedy
from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.logprobs import score as score_targets
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs
from passes.graph import Graph
from passes.incremental import emit
from passes.incremental.plan import Plan
from passes.incremental.row_format import RowFormat
from passes.incremental.state import State
from passes.replay import SAME, Widening

DEFAULT_PAGE_SIZE = 32
"""Tokens. The smallest whose gather costs nothing: decodes of 8 requests of 2048 tokens (4 layers of 4 heads of 64, two
CPU cores) take 61 ms with 32 tokens a page and with whole requests, 66 ms with 16, 67 ms with 8."""
_SAMPLERS = {"greedy": greedy.sample, "full": full.sample}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheState:
    """What lives on the device between steps.

    Attributes:
      pools: For each cached value `[*layers, P, Z, *row]`, or a pair of that and of its scales.
      own: For each window and carry `[max_num_seqs, *layers, *shape]`, one a slot.
    """

    pools: list[Any]
    own: list[Any]


@dataclass(frozen=True)
class Program:
    """A derived plan bound to the graph it came from.

    Attributes:
      num_slots: Requests that windows and carried values are kept for.
      page_size: Z, the tokens of a page.
      num_pages: P, the pages of each pool.
      unroll: Loops over layers are written out.
      row_format: How rows of caches are stored; None as they are.
      reaches: For each cache of rows those that matter to new tokens; empty where nobody has looked.
    """

    graph: Graph
    plan: Plan
    num_slots: int
    page_size: int
    num_pages: int
    unroll: bool
    row_format: RowFormat | None = None
    reaches: tuple[Reach | None, ...] = ()

    @property
    def kv_states(self) -> list[State]:
        return [s for s in self.plan.states if s.kind == "kv"]

    @property
    def own_states(self) -> list[State]:
        return [s for s in self.plan.states if s.kind != "kv"]

    def layout(self) -> CacheLayout:
        """What the program keeps, for the engine."""
        entries = [self._entry(f"{s.kind}{i}", s) for i, s in enumerate(self.plan.states)]
        form = "rectangular" if self.own_states else "ragged"
        return CacheLayout(tuple(entries), self.page_size, self.num_pages, form)

    def init_state(self, widening: Widening = SAME) -> CacheState:
        """Zeroed pools and carried values."""
        page = (self.num_pages, self.page_size)
        return CacheState(
            [self._pool(s, page, widening) for s in self.kv_states],
            [jnp.zeros((self.num_slots, *s.lead, *s.shape), widening.dtype(s.dtype)) for s in self.own_states],
        )

    def rows(self, state: State) -> list[tuple[tuple[int, ...], Any]]:
        """Shape and dtype of what is stored of a row of a cache: the row, or its rounded numbers and their scales."""
        if self.row_format is None or not self.row_format.holds(state):
            return [(state.shape, state.dtype)]
        dtypes = (self.row_format.dtype, self.row_format.scale_dtype)
        return [(state.shape, jnp.dtype(dtypes[0])), (state.shape[:-1], jnp.dtype(dtypes[1]))]

    def _pool(self, state: State, page: tuple[int, int], widening: Widening) -> Any:
        pools = [jnp.zeros((*state.lead, *page, *shape), widening.dtype(dtype)) for shape, dtype in self.rows(state)]
        return pools[0] if len(pools) == 1 else tuple(pools)

    def _entry(self, name: str, state: State) -> CacheEntry:
        stored = self.rows(state) if state.kind == "kv" else [(state.shape, state.dtype)]
        nbytes = state.layers * sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in stored)
        dtypes = [str(dtype) for _, dtype in stored]
        scale_dtype = dtypes[1] if len(dtypes) > 1 else None
        reach = dict(zip(self.kv_states, self.reaches, strict=False)).get(state)
        return CacheEntry(
            name, state.kind, state.shape, dtypes[0], state.layers, nbytes, state.source.short, scale_dtype, reach
        )

    def logits(
        self,
        leaves: Sequence[Any],
        state: CacheState,
        inputs: StepInputs,
        *,
        last_row: bool,
        widening: Widening = SAME,
    ) -> tuple[Any, Any, CacheState]:
        """Runs the model part of a step.

        Args:
          leaves: Parameters in the order of the graph's inputs.
          last_row: Make logits for the last valid row of each request only.

        Returns: Logits `[R, T / R or 1, V]`, what the vocabulary projection reads in each last valid row `[R, D]`, and
          the state after the step.
        """
        num_rows = inputs.num_new.shape[0]
        tokens = jnp.asarray(inputs.tokens).reshape(num_rows, -1)
        slots = jnp.asarray(inputs.slots)
        params = dict(zip(self.graph.inputs[:-1], leaves, strict=True))

        def one(tokens: Any, start: Any, count: Any, pages: Any, own: list[Any]) -> tuple[Any, ...]:
            request = emit.Request(tokens, start, count, pages)
            logits, hidden, pools, after = emit.run(
                self.plan,
                params,
                request,
                dict(zip(self.kv_states, state.pools, strict=True)),
                dict(zip(self.own_states, own, strict=True)),
                last_row=last_row,
                widening=widening,
                unroll=self.unroll,
                row_format=self.row_format,
            )
            return logits[0], hidden, [pools[s] for s in self.kv_states], [after[s] for s in self.own_states]

        own = [x[slots] for x in state.own]
        logits, hidden, pools, after = jax.vmap(one, out_axes=(0, 0, None, 0))(
            tokens, inputs.cache_len, inputs.num_new, self._all_pages(inputs.page_table), own
        )
        target = jnp.where(jnp.asarray(inputs.num_new) > 0, slots, self.num_slots)
        kept = [
            old.at[target].set(new.astype(old.dtype), mode="drop") for old, new in zip(state.own, after, strict=True)
        ]
        return logits, hidden, CacheState(pools, kept)

    def _all_pages(self, page_table: Any) -> Any:
        """The page table up to the graph's capacity, which may lie beyond the longest request: read and masked."""
        missing = -(-self.plan.capacity // self.page_size) - page_table.shape[1]
        return jnp.pad(page_table, ((0, 0), (0, max(missing, 0))))

    def step(
        self,
        leaves: Sequence[Any],
        state: CacheState,
        inputs: StepInputs,
        sampler: SamplerInputs | None,
        *,
        variant: str,
        score: bool,
        max_logprobs: int,
        whole: Any = None,
    ) -> tuple[StepOutputs, CacheState]:
        """One whole step: the model, the sampler, and log-probabilities of given tokens where asked for.

        Args:
          whole: The sharding of an array that is whole on every device, where there are several. Logits cut by
            vocabulary are gathered once before sampling, since each sort and sum over them would exchange them anew.
        """
        logits, hidden, state = self.logits(leaves, state, inputs, last_row=not score)
        last = logits[:, 0] if not score else _last_rows(logits, inputs.num_new)
        last = last if whole is None else jax.lax.with_sharding_constraint(last, whole)
        outputs = _SAMPLERS[variant](last.astype(jnp.float32), sampler, max_logprobs)
        outputs = dataclasses.replace(outputs, hidden=hidden.astype(jnp.float32))
        if not score:
            return outputs, state
        flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
        scored = score_targets(flat, jnp.asarray(inputs.targets), max_logprobs)
        return dataclasses.replace(outputs, score=scored), state


def make_program(
    graph: Graph,
    plan: Plan,
    *,
    num_slots: int,
    unroll: bool,
    page_size: int | None = None,
    num_pages: int | None = None,
    max_model_len: int | None = None,
) -> Program:
    """A program with its pools measured.

    Args:
      page_size: Tokens of a page; `DEFAULT_PAGE_SIZE` by default, and never more than a request has.
      num_pages: By default as many as `num_slots` requests of full length take.
      max_model_len: Tokens that a request may reach; by default the graph's capacity.

    Raises:
      UserError: the pages do not hold a request of full length.
    """
    longest = plan.capacity if max_model_len is None else max_model_len
    page_size = min(DEFAULT_PAGE_SIZE if page_size is None else page_size, longest)
    needed = -(-longest // page_size)
    if num_pages is not None and num_pages < needed:
        raise UserError(
            f"num_pages must be at least {needed}, the pages of {page_size} tokens that a request of {longest} tokens "
            f"takes, got {num_pages}; raise it, or lower max_model_len"
        )
    return Program(graph, plan, num_slots, page_size, num_slots * needed if num_pages is None else num_pages, unroll)


def _last_rows(logits: Any, num_new: Any) -> Any:
    index = jnp.maximum(jnp.asarray(num_new) - 1, 0)
    return jnp.take_along_axis(logits, index[:, None, None], axis=1)[:, 0]
