"""Turns a plan into the arrays of one compiled step, gives them to the device, and brings back what was asked for.

Knows no policy. The one idea: whatever a plan says is laid out while the step before runs; what only that step can tell
(its tokens, and who is done) is filled in just before the next one starts. Where its tokens are all that is missing,
they never leave the device, and nobody waits.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from fastgpt_jax.artifact.entry_points import EntryPointKey, Variant
from fastgpt_jax.engine.compiled import CompiledModel
from fastgpt_jax.engine.device_caches import DeviceCaches
from fastgpt_jax.engine.request import Request
from fastgpt_jax.engine.scheduler import Plan
from fastgpt_jax.engine.shapes import Row
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs
from fastgpt_jax.sampling.table import SamplerTable


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A step that the device was given.

    Attributes:
      key: The entry point.
      outputs: Its outputs, on the device.
      dispatched: When, in seconds of the monotonic clock.
    """

    plan: Plan
    key: EntryPointKey
    outputs: StepOutputs
    dispatched: float

    @property
    def is_done(self) -> bool:
        """Whether the device is through with it."""
        is_ready = getattr(self.outputs.ids, "is_ready", None)
        return is_ready is None or is_ready()


@dataclasses.dataclass(frozen=True)
class Fetched:
    """Results of a step on the host; None for what nobody asked for."""

    ids: np.ndarray
    logprobs: np.ndarray
    full_sorts: np.ndarray | None = None
    ranks: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    score: Any = None
    hidden: np.ndarray | None = None


class Runner:
    """Runs steps of one compiled model, and keeps the sampler's inputs of the requests that hold slots.

    Invariants: a slot's row of the table holds its request's history, where that needs the full sampler; no array that
    a step was given is changed afterwards.
    """

    def __init__(
        self, compiled: CompiledModel, caches: DeviceCaches, page_tables: np.ndarray, *, is_always_full: bool = False
    ):
        """Makes a runner.

        Args:
          page_tables: The pages of the request in each slot, kept by others.
          is_always_full: Whether steps that only take the most likely tokens run the full sampler too.
        """
        self._is_always_full = is_always_full
        self._compiled = compiled
        self._caches = caches
        self._page_tables = page_tables
        self._table = SamplerTable(compiled.max_num_seqs, compiled.vocab_size, compiled.max_model_len)

    def admit(self, request: Request) -> None:
        """Prepares the sampler for a request that got its slot, with all it has so far."""
        params, slot = request.params, request.slot
        if slot is None or not request.needs_full_sampler or not isinstance(params, SamplingParams):
            return
        tokens = request.tokens(0, request.num_tokens)
        self._table.write(slot, params, tokens, num_prompt=request.num_prompt, seed=request.seed)
        if len(request.output_token_ids) < request.group.min_tokens:
            self._table.ban(slot, request.group.eos_ids | request.group.stop_ids)

    def append(self, request: Request, token_id: int) -> None:
        """Tells the sampler of a generated token that another one will follow."""
        if request.slot is None or not request.needs_full_sampler:
            return
        self._table.append(request.slot, token_id)
        if len(request.output_token_ids) == request.group.min_tokens and request.structured is None:
            self._table.allow_all(request.slot)

    def constrain(self, request: Request) -> None:
        """Lets a request's next token be one that its form takes, and none that would end it too early."""
        if request.slot is None or request.structured is None:
            return
        is_early = len(request.output_token_ids) < request.group.min_tokens
        banned = request.group.eos_ids | request.group.stop_ids if is_early else frozenset()
        self._table.restrict(request.slot, request.structured.bitmask(), banned)

    def prepare(self, plan: Plan) -> StepInputs:
        """Lays out what is known of a step."""
        num_rows, chunk_len = plan.shape.num_rows, plan.shape.chunk_len
        tokens = np.zeros((num_rows, chunk_len), np.int32)
        targets = np.zeros((num_rows, chunk_len), np.int32)
        num_new, cache_len, slots = (np.zeros((num_rows,), np.int32) for _ in range(3))
        for index, row, _ in plan.placed:
            cache_len[index], num_new[index], slots[index] = row.start, row.num_new, row.request.held_slot
            _fill(tokens[index], row)
            if plan.is_scored:
                following = row.request.tokens(row.start + 1, row.stop + 1)
                targets[index, : len(following)] = following
        return StepInputs(
            tokens=tokens.reshape(-1),
            num_new=num_new,
            page_table=self._page_tables[slots],
            cache_len=cache_len,
            slots=slots,
            targets=targets.reshape(-1),
        )

    def following(self, plan: Plan, step: InFlight) -> Plan | None:
        """A plan with every row where a step under way draws its token; None where anything else is missing."""
        if plan.shape.chunk_len > 1 or plan.is_scored or plan.shape.num_rows != step.plan.shape.num_rows:
            return None
        drawn = {id(row.request): place for place, row, samples in step.plan.placed if samples}
        places = []
        for row in plan.rows:
            place = drawn.get(id(row.request))
            if place is None or row.start != row.request.num_tokens or not row.request.draws_unseen:
                return None
            places.append(place)
        return dataclasses.replace(plan, places=tuple(places))

    def dispatch_after(self, plan: Plan, inputs: StepInputs, step: InFlight) -> InFlight:
        """Gives a plan that follows a step to the device with the tokens that the step draws, whatever they are."""
        return self._start(plan, dataclasses.replace(inputs, tokens=step.outputs.ids), num_unseen=1)

    def dispatch(self, plan: Plan, inputs: StepInputs) -> InFlight | None:
        """Completes a step and gives it to the device; None where all that it was for has ended."""
        tokens = np.asarray(inputs.tokens).reshape(plan.shape.num_rows, -1)
        is_idle = True
        for index, row, _ in plan.placed:
            if row.request.is_finished:
                inputs.num_new[index] = 0
                continue
            is_idle = False
            if not plan.is_independent:
                _fill(tokens[index], row)
        return None if is_idle else self._start(plan, inputs)

    def _start(self, plan: Plan, inputs: StepInputs, num_unseen: int = 0) -> InFlight:
        """Args: num_unseen: Tokens of every request that its row of the table lacks."""
        rows = [row for row in plan.rows if not row.request.is_finished]
        is_full = self._is_always_full or plan.is_scored or any(row.request.needs_full_sampler for row in rows)
        variant: Variant = "full" if is_full else "greedy"
        key = EntryPointKey(plan.shape.num_tokens, plan.shape.num_rows, variant, plan.is_scored)
        sampler = self._table.take(self._sampled_slots(plan), num_unseen) if is_full else None
        outputs, self._caches.state = self._compiled.step(
            self._caches.state, inputs, sampler, variant=variant, score=plan.is_scored
        )
        return InFlight(plan, key, outputs, time.monotonic())

    def fetch(self, step: InFlight) -> Fetched:
        """Waits for a step and brings what its requests asked for."""
        outputs, plan = step.outputs, step.plan
        sampled = [row.request for row, samples in zip(plan.rows, plan.samples, strict=True) if samples]
        names = ["ids", "logprobs"]
        if step.key.variant == "full":
            names.append("full_sorts")
        if any(request.group.wants_logprobs for request in sampled):
            names += ["ranks", "top_ids", "top_logprobs"]
        if plan.is_scored:
            names.append("score")
        if any(request.group.is_pooling for request in sampled):
            names.append("hidden")
        values = jax.device_get([getattr(outputs, name) for name in names])
        return Fetched(**dict(zip(names, values, strict=True)))

    def _sampled_slots(self, plan: Plan) -> list[int | None]:
        """The rows of the table; neutral ones for idle rows and for requests that take the most likely token."""
        slots: list[int | None] = [None] * plan.shape.num_rows
        for index, row, samples in plan.placed:
            request = row.request
            if samples and request.needs_full_sampler and not request.is_finished:
                slots[index] = request.slot
        return slots


def _fill(tokens: np.ndarray, row: Row) -> None:
    """Writes the tokens of a row that are known."""
    known = row.request.tokens(row.start, row.stop)
    tokens[: len(known)] = known
