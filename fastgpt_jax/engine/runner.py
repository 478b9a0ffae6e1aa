"""Turns a batch into the arrays of one compiled step, runs it, and brings the results back as NumPy.

Knows no policy. The one idea: the device state has one owner, which replaces it at every step, since a step donates
the one it was given.
"""

from __future__ import annotations

import jax
import numpy as np

from fastgpt_jax.engine.compiled import CompiledModel
from fastgpt_jax.engine.request import Request
from fastgpt_jax.engine.scheduler import Batch
from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs
from fastgpt_jax.sampling.table import SamplerTable


class Runner:
    """Runs steps of one compiled model, and keeps the sampler's inputs of the requests that hold slots.

    Invariants: `_state` is never one that was donated; a slot's row of the table holds its request's history.
    """

    def __init__(self, compiled: CompiledModel):
        self._compiled = compiled
        self._state = compiled.init_state()
        self._table = SamplerTable(compiled.max_num_seqs, compiled.vocab_size, compiled.max_model_len)

    def admit(self, request: Request) -> None:
        """Prepares the sampler for a request that got its slot."""
        slot = request.page
        prompt = request.prompt_token_ids
        self._table.write(slot, request.params, prompt, num_prompt=len(prompt), seed=request.seed)
        self._table.ban(slot, request.banned_ids)

    def append(self, request: Request, token_id: int) -> None:
        """Tells the sampler of a generated token that another one will follow."""
        self._table.append(request.page, token_id)
        if len(request.output_token_ids) == request.params.min_tokens:
            self._table.allow_all(request.page)

    def run(self, batch: Batch) -> StepOutputs:
        """Runs one step and waits for it, so that the arrays handed over may be changed afterwards."""
        is_scored = any(request.wants_score and request.is_prefilling for request in batch.requests)
        is_full = is_scored or any(request.needs_full_sampler for request in batch.requests)
        outputs, self._state = self._compiled.step(
            self._state,
            make_step_inputs(batch, self._compiled.layout.pages_per_request(self._compiled.max_model_len)),
            self._sampler_inputs(batch) if is_full else None,
            variant="full" if is_full else "greedy",
            score=is_scored,
        )
        return jax.device_get(outputs)

    def _sampler_inputs(self, batch: Batch) -> SamplerInputs:
        return self._table.take([None if request is None else request.slot for request in batch.rows])


def make_step_inputs(batch: Batch, pages_per_request: int) -> StepInputs:
    """Lays the batch's new tokens out in rows of `chunk_len`, with the token that follows each as its target."""
    num_rows = len(batch.rows)
    tokens = np.zeros((num_rows, batch.chunk_len), np.int32)
    targets = np.zeros((num_rows, batch.chunk_len), np.int32)
    cache_len = np.zeros((num_rows,), np.int32)
    for row, (request, num_new) in enumerate(zip(batch.rows, batch.num_new, strict=True)):
        if request is None:
            continue
        start = cache_len[row] = request.num_cached
        tokens[row, :num_new] = request.tokens(start, start + num_new)
        following = request.tokens(start + 1, start + num_new + 1)
        targets[row, : len(following)] = following
    slots = np.asarray(batch.slots, np.int32)
    return StepInputs(
        tokens=tokens.reshape(-1),
        num_new=np.asarray(batch.num_new, np.int32),
        page_table=slots[:, None] * pages_per_request + np.arange(pages_per_request, dtype=np.int32),
        cache_len=cache_len,
        slots=slots,
        targets=targets.reshape(-1),
    )
