"""A trial of the derived step: tokens served in chunks and one by one from poisoned memory, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.compiler.comparison import TOLERANCE, difference, largest_logit
from fastgpt_jax.compiler.forwards import WIDE, Jit
from fastgpt_jax.compiler.program import CacheState, Program
from fastgpt_jax.sampling.step_io import StepInputs
from passes.incremental.errors import NotServable

_PREFILL_CHUNKS = 3
_DECODE_STEPS = 4
_TRIAL_PAGES = 4


def check_step(
    program: Program, leaves: Sequence[Any], tokens: np.ndarray, whole: np.ndarray, first_chunk: int, jit: Jit
) -> float:
    """Serves the tokens in chunks and one by one from poisoned memory; returns the worst error."""
    served = serve_logits(program, leaves, tokens, first_chunk, jit)
    error = difference(served, whole)
    if error > TOLERANCE:
        wrong = np.abs(np.nan_to_num(served, nan=1e30) - np.nan_to_num(whole)).max(axis=1)
        row = int(np.argmax(wrong > TOLERANCE * largest_logit(np.abs(whole[np.isfinite(whole)]))))
        raise NotServable(
            f"the derived step differs from the forward by {error:.1e} of the largest logit, first at token {row} of "
            f"{len(tokens)}; the model combines tokens in a way the derivation does not follow"
        )
    return error


def serve_logits(
    program: Program, leaves: Sequence[Any], tokens: np.ndarray, first_chunk: int = 1, jit: Jit = jax.jit
) -> np.ndarray:
    """Logits f32 [T, V] of the derived step in float32: chunks (the last one padded), then single tokens."""
    decode = min(_DECODE_STEPS, max(len(tokens) - first_chunk, 0))
    prefill = len(tokens) - decode
    chunk = max(first_chunk, -(-prefill // _PREFILL_CHUNKS) + 1)
    chunk = min(chunk, prefill)
    first = first_chunk if first_chunk > 1 else chunk

    program = _small(program)
    step = jit(lambda *args: program.logits(*args, last_row=False, widening=WIDE))
    state, out, start = _poisoned(program.init_state(WIDE)), [], 0
    with jax.default_matmul_precision("highest"):
        while start < len(tokens):
            size = chunk if start < prefill else 1
            end = min(start + (first if start == 0 else size), prefill if start < prefill else len(tokens))
            count = end - start
            logits, _, state = step(
                list(leaves), state, one_request(program, tokens[start : start + count], size, start)
            )
            out.append(np.asarray(logits[0, :count].astype(jnp.float32)))
            start += count
    return np.concatenate(out)


def one_request(program: Program, tokens: np.ndarray, size: int, start: int) -> StepInputs:
    """A step of one request in the last slot and the last pages, backwards: they are looked up and not assumed."""
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    num_pages = -(-program.plan.capacity // program.page_size)
    return StepInputs(
        tokens=jnp.asarray(padded),
        num_new=jnp.asarray([len(tokens)], jnp.int32),
        page_table=jnp.arange(program.num_pages - 1, program.num_pages - 1 - num_pages, -1, dtype=jnp.int32)[None],
        cache_len=jnp.asarray([start], jnp.int32),
        slots=jnp.asarray([program.num_slots - 1], jnp.int32),
        targets=jnp.zeros(size, jnp.int32),
    )


def _small(program: Program) -> Program:
    """The program with little memory: a slot and a page to spare, and a request in several pages."""
    capacity = program.plan.capacity
    page_size = min(program.page_size, max(1, -(-capacity // _TRIAL_PAGES)))
    return dataclasses.replace(program, num_slots=2, page_size=page_size, num_pages=-(-capacity // page_size) + 1)


def _poisoned(state: CacheState) -> CacheState:
    """Memory as it may be found: not a number where that exists, else a large number."""

    def poison(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.full_like(x, jnp.nan)
        return jnp.ones_like(x) if x.dtype == bool else jnp.full_like(x, 7)

    return jax.tree.map(poison, state)
