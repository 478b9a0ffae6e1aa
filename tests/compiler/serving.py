"""Derives a zoo model and serves two requests of it from poisoned memory, to be compared with the plain forward.

Knows the compiler's parts up to `Program`, and neither certificate nor engine. The one idea: the second request is the
first with one earlier token changed, and the two stand at different positions in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler.capture import as_forward, capture
from fastgpt_jax.compiler.program import CacheState, Program, make_program
from fastgpt_jax.sampling.step_io import StepInputs
from passes.incremental.derive import derive
from tests.compiler import zoo

NUM_SLOTS = 3
SLOTS = (1, 0)  # of the two requests, out of order; the third slot, and its pages, belong to nobody
PAGE_SIZE = 5  # divides neither chunks nor capacities
CHUNK = 8


@dataclass(frozen=True)
class Turn:
    """What one step gives each of the two requests: from which position, how many tokens; 0 leaves it idle."""

    chunk: int
    starts: tuple[int, int]
    counts: tuple[int, int]


def turns(length: int, first_chunk: int) -> Iterator[Turn]:
    """A schedule with two chunk lengths, so that a step compiles twice.

    First chunks of different lengths, the shorter one padded; second ones too, padded the other way round; then single
    tokens, where each request in turn is idle for a step.
    """
    chunk = max(CHUNK, first_chunk)
    at = [0, 0]

    def turn(size: int, *counts: int) -> Turn:
        given = tuple(min(n, length - start) for n, start in zip(counts, at, strict=True))
        out = Turn(size, (at[0], at[1]), (given[0], given[1]))
        at[:] = [start + n for start, n in zip(at, given, strict=True)]
        return out

    yield turn(chunk, chunk, max(first_chunk, chunk - 3))
    yield turn(chunk, chunk - 4, chunk)
    step = 0
    while min(at) < length:
        yield turn(1, int(step % 5 != 1), int(step % 5 != 3))
        step += 1


@dataclass(frozen=True)
class Derived:
    """A zoo model with its derived program.

    Attributes:
      fn: The model's own forward, untouched.
    """

    model: zoo.ZooModel
    fn: zoo.model.Forward
    params: Any
    program: Program

    def full_logits(self, requests: np.ndarray) -> np.ndarray:
        """Logits f32 [R, T, V] of the user's forward, one request at a time, at the nearest length that it accepts."""
        length = requests.shape[1]
        accepted = next(n for n in range(length, self.model.capacity + 1) if self.model.accepts(n))
        padded = np.pad(requests, ((0, 0), (0, accepted - length)))
        forward = zoo.quick_jit(zoo.full_forward(self.model, self.fn))
        with zoo.jax_defaults():
            return np.stack([np.asarray(forward(self.params, row[None]))[0, :length] for row in padded])

    def served_logits(self, requests: np.ndarray) -> np.ndarray:
        """Logits f32 [2, T, V] of the derived step, batched, from poisoned memory; NaN where a row was never served."""

        def step(leaves: Any, state: CacheState, inputs: StepInputs) -> tuple[Any, CacheState]:
            logits, _, state = self.program.logits(leaves, state, inputs, last_row=False)
            return logits, state

        run, state = zoo.quick_jit(step, donate_argnums=1), poisoned(self.program.init_state())
        leaves = jax.tree.leaves(self.params)
        out: np.ndarray | None = None
        with zoo.jax_defaults():
            for turn in turns(requests.shape[1], self.model.first_chunk):
                logits, state = run(leaves, state, step_inputs(requests, turn, self.program))
                rows = np.asarray(logits.astype(jnp.float32))
                if out is None:
                    out = np.full((*requests.shape, rows.shape[-1]), np.nan, np.float32)
                for r, (start, count) in enumerate(zip(turn.starts, turn.counts, strict=True)):
                    out[r, start : start + count] = rows[r, :count]
        if out is None:
            raise ValueError("no step was run")
        return out


def derive_model(model: zoo.ZooModel, *, unroll: bool = True) -> Derived:
    """Captures and derives a zoo model at its capacity, without a certificate."""
    with zoo.jax_defaults():
        fn, params = model.make()
        forward, leaves = as_forward(fn, params)
        captured = capture(forward, leaves, model.capacity)
    plan = derive(captured.graph, captured.times, captured.token_input)
    program = make_program(captured.graph, plan, num_slots=NUM_SLOTS, unroll=unroll, page_size=PAGE_SIZE)
    return Derived(model, fn, leaves, program)


def two_requests(model: zoo.ZooModel) -> tuple[np.ndarray, int]:
    """Tokens i32 [2, T], the second request with one token changed, and the position of the change."""
    tokens = zoo.tokens_of(model)
    position, token = zoo.perturbation(model)
    changed = tokens.copy()
    changed[0, position] = token
    return np.concatenate([tokens, changed]), position


def page_table(program: Program) -> np.ndarray:
    """Pages i32 [slots, M] of each slot's request: all there are, dealt out one by one from the last."""
    pages = np.arange(program.num_pages - 1, -1, -1, dtype=np.int32)
    return pages.reshape(-1, NUM_SLOTS).T


def step_inputs(requests: np.ndarray, turn: Turn, program: Program) -> StepInputs:
    """The arrays of one step; an idle row names the other request's slot and pages, which it must leave alone."""
    tokens = np.full((2, turn.chunk), 1, np.int32)
    for r, (start, count) in enumerate(zip(turn.starts, turn.counts, strict=True)):
        tokens[r, :count] = requests[r, start : start + count]
    slots = np.asarray([SLOTS[r] if count else SLOTS[1 - r] for r, count in enumerate(turn.counts)], np.int32)
    return StepInputs(
        tokens=tokens.reshape(-1),
        num_new=np.asarray(turn.counts, np.int32),
        page_table=page_table(program)[slots],
        cache_len=np.asarray(
            [start if count else 0 for start, count in zip(turn.starts, turn.counts, strict=True)], np.int32
        ),
        slots=slots,
        targets=np.zeros(2 * turn.chunk, np.int32),
    )


def poisoned(state: Any) -> Any:
    """Memory as another request may have left it: NaN, or a number that means something else."""

    def poison(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.full_like(x, jnp.nan)
        return jnp.ones_like(x) if x.dtype == bool else jnp.full_like(x, 7)

    return jax.tree.map(poison, state)
