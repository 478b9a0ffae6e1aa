"""Numbers that an artifact must reproduce before it serves: the likeliest tokens after a fixed prompt.

The one idea: versions and digests can all agree while a library computes something else, so the program is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fastgpt_jax.artifact.cache_layout import CacheLayout
from fastgpt_jax.artifact.entry_points import Buckets, EntryPointKey
from fastgpt_jax.artifact.manifest import Fingerprint
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.step_io import StepInputs

NUM_TOP = 5
PROMPT_LEN = 16
TOLERANCE = 0.02
"""Of a log-probability: bfloat16 programs of another XLA stay below it, a changed operation does not."""

RunStep = Callable[[EntryPointKey, list[Any], StepInputs], tuple[Any, list[Any]]]


def make_prompt(vocab_size: int, buckets: Buckets, min_first_chunk: int) -> tuple[int, ...]:
    """A prompt that visits the vocabulary and fits the shortest prefill that holds a first chunk."""
    chunk_len = next(n for n in buckets.chunk_lens if n >= min_first_chunk)
    return tuple(int(i * 7919 + 1) % vocab_size for i in range(max(min_first_chunk, min(chunk_len, PROMPT_LEN))))


def measure(
    prompt_ids: tuple[int, ...],
    buckets: Buckets,
    layout: CacheLayout,
    max_model_len: int,
    run: RunStep,
    state: list[Any],
) -> tuple[Fingerprint, list[Any]]:
    """Runs the prompt on the first pages; returns what came out, and the state, which may be used further."""
    chunk_len = next(n for n in buckets.chunk_lens if n >= len(prompt_ids))
    num_rows = buckets.prefill_rows(chunk_len)[0]
    key = EntryPointKey(chunk_len * num_rows, num_rows, "greedy", False)
    tokens = np.zeros((num_rows, chunk_len), np.int32)
    tokens[0, : len(prompt_ids)] = prompt_ids
    num_new = np.zeros(num_rows, np.int32)
    num_new[0] = len(prompt_ids)
    pages = np.arange(layout.pages_per_request(max_model_len), dtype=np.int32)
    inputs = StepInputs(
        tokens=tokens.reshape(-1),
        num_new=num_new,
        page_table=np.tile(pages, (num_rows, 1)),
        cache_len=np.zeros(num_rows, np.int32),
        slots=np.zeros(num_rows, np.int32),
        targets=tokens.reshape(-1),
    )
    outputs, state = run(key, state, inputs)
    top_ids, top_logprobs = jax.device_get((outputs.top_ids, outputs.top_logprobs))
    found = Fingerprint(
        prompt_ids,
        tuple(int(x) for x in top_ids[0, :NUM_TOP]),
        tuple(float(x) for x in top_logprobs[0, :NUM_TOP]),
        TOLERANCE,
    )
    return found, state


def check(expected: Fingerprint, found: Fingerprint) -> None:
    """Compares; tokens whose log-probabilities are equal within the tolerance may change places.

    Raises:
      UserError: The program computes something else than it did when it was compiled.
    """
    error = max((abs(a - b) for a, b in zip(expected.top_logprobs, found.top_logprobs, strict=True)), default=0.0)
    by_id = dict(zip(expected.top_ids, expected.top_logprobs, strict=True))
    last = expected.top_logprobs[-1] + expected.tolerance
    strangers = [i for i, x in zip(found.top_ids, found.top_logprobs, strict=True) if i not in by_id and x > last]
    moved = [
        i
        for i, x in zip(found.top_ids, found.top_logprobs, strict=True)
        if i in by_id and abs(by_id[i] - x) > expected.tolerance
    ]
    if not error <= expected.tolerance or strangers or moved:
        raise UserError(
            f"the fingerprint does not hold: log-probabilities of a fixed prompt differ by {error:.2g} from those at "
            f"compile time (tolerance {expected.tolerance:g}); do not serve this, compile the model again here"
        )
