"""The loop that knows ids alone: requests in, steps of the compiled model, tokens out.

Knows no text. The one idea: while the device runs one step the next is chosen and laid out. Where the ids of the first
are all that it lacks, the device has it at once and takes them from its own memory; what a request that ended with them
gets too much is dropped. Otherwise they are filled in when they are there, and the next starts before anybody looks at
what the first means.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastgpt_jax.artifact.cache_layout import SNAPSHOTS_PER_REQUEST
from fastgpt_jax.engine.cache_memory import CacheMemory
from fastgpt_jax.engine.compile_counter import compile_counter
from fastgpt_jax.engine.compiled import CompiledModel
from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.device_caches import DeviceCaches
from fastgpt_jax.engine.device_clock import DeviceClock
from fastgpt_jax.engine.request import Request, RequestGroup
from fastgpt_jax.engine.results import describe, follow_form, read_hidden, read_prompt_scores, read_token
from fastgpt_jax.engine.runner import Fetched, InFlight, Runner
from fastgpt_jax.engine.scheduler import Batching, How, Plan, Scheduler
from fastgpt_jax.engine.shapes import Shapes
from fastgpt_jax.engine.stats import EngineStats
from fastgpt_jax.engine.updates import TokenScore, Update
from fastgpt_jax.errors import UserError

MIN_DEADLINES = 512
"""Deadlines of finished requests are kept up to about so many before they are cleared away."""


class EngineCore:
    """Runs requests of different lengths together.

    Invariants: every unfinished request is in the scheduler; at most two steps are under way, and at the end of `step`
    one; whatever is asked of it between two calls of `step` takes effect at once.
    """

    def __init__(self, compiled: CompiledModel, options: CoreOptions, clock: Callable[[], float] = time.monotonic):
        layout = compiled.layout
        if (options.max_batch or 1) > compiled.max_num_seqs:
            raise UserError(
                f"max_batch must be at most max_num_seqs, got {options.max_batch} and {compiled.max_num_seqs}; compile "
                "the model for more"
            )
        self.compiled = compiled
        self._clock = clock
        self._caches = DeviceCaches(compiled)
        pages_per_request = layout.pages_per_request(compiled.max_model_len)
        if layout.num_pages < pages_per_request:
            raise UserError(
                f"num_pages must be at least {pages_per_request}, for one request of {compiled.max_model_len} tokens, "
                f"got {layout.num_pages}; raise it, or lower max_model_len"
            )
        memory = CacheMemory(
            self._caches,
            num_slots=compiled.max_num_seqs,
            num_pages=layout.num_pages,
            page_size=layout.page_size,
            pages_per_request=pages_per_request,
            min_first_chunk=compiled.min_first_chunk,
            reach=layout.reach,
            has_prefix_cache=options.enable_prefix_caching and not options.pins_buckets,
            max_snapshots=options.max_snapshots or SNAPSHOTS_PER_REQUEST * compiled.max_num_seqs,
            swap_bytes=options.swap_bytes,
            poisons=options.poison_freed_pages,
        )
        shapes = Shapes(
            compiled.buckets,
            is_ragged=layout.form == "ragged",
            min_first_chunk=compiled.min_first_chunk,
            max_tokens=options.max_num_batched_tokens,
            is_pinned=options.pins_buckets,
        )
        batching = Batching(
            options.max_batch or compiled.max_num_seqs,
            options.min_batch,
            options.batch_timeout_ms / 1000,
        )
        self.scheduler = Scheduler(memory, shapes, batching, compiled.max_model_len)
        self._runner = Runner(compiled, self._caches, memory.table, is_always_full=options.pins_buckets)
        self._memory = memory
        self._device_clock = DeviceClock()
        self._in_flight: deque[InFlight] = deque()
        self._deadlines: list[tuple[float, int, RequestGroup]] = []
        self._updates: list[Update] = []
        self._stops: deque[tuple[Request, str, str | None]] = deque()
        self._counts = dict.fromkeys(_COUNTS, 0)
        self.num_full_sorts = 0
        self._compiles = compile_counter()
        self._num_compiles_before = self._compiles.num_compiles

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do, or to tell, now or later."""
        scheduler = self.scheduler
        return bool(scheduler.running or scheduler.waiting or self._updates or self._stops or self._in_flight)

    def seconds_until_due(self) -> float:
        """How long until `step` has something to do, where it waits for more requests to begin with; else 0."""
        if self._updates or self._stops or self._in_flight:
            return 0.0
        wait_s = self.scheduler.seconds_until_due(now := self._clock())
        return min(wait_s, max(self._deadlines[0][0] - now, 0.0)) if self._deadlines else wait_s

    def add(self, group: RequestGroup) -> None:
        """Queues all continuations of a prompt."""
        for request in group.requests:
            self.scheduler.add(request)
        if group.deadline is not None:
            if len(self._deadlines) > 2 * (MIN_DEADLINES + len(self.scheduler.waiting) + len(self.scheduler.running)):
                self._deadlines = [entry for entry in self._deadlines if not entry[2].is_finished]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (group.deadline, group.requests[0].order[1], group))

    def abort(self, requests: Iterable[Request]) -> None:
        """Ends requests and frees all they hold at once; nothing more is told of them."""
        for request in requests:
            if not request.is_finished:
                self._end(request, "abort")

    def abort_all(self) -> None:
        """Ends all requests there are."""
        self.abort([*self.scheduler.running, *self.scheduler.waiting])

    def stop(self, request: Request, finish_reason: str, stop_reason: str | None) -> None:
        """Ends a request whose text has ended, before the next step; any thread may say so."""
        self._stops.append((request, finish_reason, stop_reason))

    def step(self) -> list[Update]:
        """Has the device run a step; returns the news of the one that is done."""
        self.end_stopped()
        self._end_overdue()
        if not self._in_flight:
            self._launch(self._plan())
        if self._in_flight:
            self._turn()
        if not (self.scheduler.running or self.scheduler.waiting):
            self._forget_steps()
        updates, self._updates = self._updates, []
        return updates

    def preempt(self, request: Request, how: How) -> None:
        """Takes its pages from a running request, as happens when there are too few."""
        self.scheduler.preempt(request, how)

    def _turn(self) -> None:
        """Prepares a step while the oldest runs, takes what that brings, and starts the next."""
        self._see()
        plan = self._plan(self._in_flight[-1])
        self._see()
        if plan is not None and (plan[0].is_independent or plan[0].follows):
            self._launch(plan)
            plan = None
        if not self._in_flight:  # the launch failed, and all begins anew
            return
        step = self._in_flight.popleft()
        try:
            fetched = self._runner.fetch(step)
        except Exception as error:
            self._recover(step.plan.requests, error)
            return
        self._device_clock.end(self._clock())
        self._absorb(step.plan, fetched)
        self._launch(plan)
        if not self._in_flight:
            self._launch(self._plan())

    def _see(self) -> None:
        if self._in_flight:
            self._device_clock.see(self._in_flight[0].is_done, self._clock())

    def _plan(self, under_way: InFlight | None = None) -> tuple[Plan, Any] | None:
        """Chooses the next step and lays it out, after one under way if it can follow that."""
        admitted: list[Request] = []
        try:
            plan = self.scheduler.schedule(self._clock())
            admitted = self.scheduler.take_admitted()
            for request in admitted:
                self._runner.admit(request)
            if plan is not None and under_way is not None and not plan.is_independent:
                plan = self._following(plan, under_way) or plan
            return None if plan is None else (plan, self._runner.prepare(plan))
        except Exception as error:
            self._recover(*self._blame(error, admitted or self.scheduler.take_admitted()))
            return None

    def _following(self, plan: Plan, step: InFlight) -> Plan | None:
        """A plan as it can follow a step; None where it must wait for what the step brings."""
        if any(self._memory.keeps_carried(row.stop) for row in plan.rows):
            return None
        return self._runner.following(plan, step)

    def _blame(self, error: Exception, admitted: Sequence[Request]) -> tuple[Sequence[Request], Exception]:
        """Says whose error in planning it was, and what it was: pages are moved there, so it may be a failed step's.

        Args:
          admitted: Requests that this plan let in.
        """
        for step in self._in_flight:
            try:
                self._runner.fetch(step)
            except Exception as failure:
                return step.plan.requests, failure
        newcomers = [*admitted, *(request for request in self.scheduler.waiting if request.slot is not None)]
        return newcomers or tuple(self.scheduler.running) or tuple(self.scheduler.waiting[:1]), error

    def _launch(self, plan: tuple[Plan, Any] | None) -> None:
        """Gives a step to the device, and names the pages that it fills."""
        if plan is None:
            return
        try:
            if plan[0].follows:
                step = self._runner.dispatch_after(*plan, self._in_flight[-1])
            else:
                self._constrain(plan[0])
                step = self._runner.dispatch(*plan)
            if step is None:
                return
            for request in step.plan.requests:
                if not request.is_finished:
                    self._memory.name_pages(request)
                    self._memory.free_dead_pages(request)
        except Exception as error:
            self._recover(plan[0].requests, error)
            return
        self._in_flight.append(step)
        self._device_clock.start(step.key, step.dispatched)
        self._count(step)

    def _constrain(self, plan: Plan) -> None:
        """Asks forms of texts what they allow; one that fails ends its own request."""
        for row, samples in zip(plan.rows, plan.samples, strict=True):
            request = row.request
            if not samples or request.structured is None or request.is_finished:
                continue
            try:
                self._runner.constrain(request)
                failure = request.structured.failure
            except Exception as error:
                failure = describe(error)
            if failure is not None:
                self._fail(request, failure)

    def _absorb(self, plan: Plan, fetched: Fetched) -> None:
        """Takes the results of a step."""
        for index, row, samples in plan.placed:
            request = row.request
            if request.is_finished:
                continue
            scores = read_prompt_scores(row, index * plan.shape.chunk_len, fetched) if plan.is_scored else ()
            if not samples:
                if scores:
                    self._updates.append(Update(request, prompt_scores=scores))
                continue
            request.num_awaited -= 1
            if request.group.is_pooling:
                self._end(request, "stop")
                self._updates.append(Update(request, hidden=read_hidden(index, fetched), finish_reason="stop"))
            else:
                self._append(request, index, fetched, scores)

    def _append(self, request: Request, index: int, fetched: Fetched, scores: tuple[TokenScore, ...]) -> None:
        """Gives a request its next token."""
        token = read_token(request, index, fetched)
        if fetched.full_sorts is not None:
            self.num_full_sorts += int(fetched.full_sorts[index])
        self._counts["generation_tokens"] += 1
        request.append(token.token_id, self.compiled.max_model_len)
        error = follow_form(request, token.token_id)
        if request.is_finished:
            self._memory.name_pages(request)
            self.scheduler.remove(request)
        else:
            self._runner.append(request, token.token_id)
        ended = {"finish_reason": request.finish_reason, "stop_reason": request.stop_reason}
        self._updates.append(Update(request, token, scores, **ended, error=error))

    def _end(self, request: Request, finish_reason: str, stop_reason: str | int | None = None) -> None:
        self.scheduler.remove(request)
        request.end(finish_reason, stop_reason)
        if not (self.scheduler.running or self.scheduler.waiting):
            self._forget_steps()

    def end_stopped(self) -> None:
        """Ends the requests whose texts have ended."""
        while self._stops:
            request, finish_reason, stop_reason = self._stops.popleft()
            if not request.is_finished:
                self._end(request, finish_reason, stop_reason)

    def _end_overdue(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            _, _, group = heapq.heappop(self._deadlines)
            for request in group.requests:
                if not request.is_finished:
                    self._end(request, "deadline")
                    self._updates.append(Update(request, finish_reason="deadline"))

    def _fail(self, request: Request, failure: str) -> None:
        self._end(request, "error")
        self._updates.append(Update(request, finish_reason="error", error=failure))

    def _recover(self, requests: Sequence[Request], error: Exception) -> None:
        """Ends the requests of a step that failed, and has all others compute again, since the caches are lost."""
        self._counts["num_failed_steps"] += 1
        self._forget_steps()
        self.scheduler.reset()
        for request in requests:
            if not request.is_finished:
                self._fail(request, describe(error))

    def _forget_steps(self) -> None:
        """Takes no interest in what is under way; the device does it, and in order, all the same."""
        self._in_flight.clear()
        self._device_clock = self._device_clock.anew()

    def _count(self, step: InFlight) -> None:
        plan, counts = step.plan, self._counts
        num_new = sum(row.num_new for row in plan.rows if not row.request.is_finished)
        counts["num_steps"] += 1
        counts["computed_tokens"] += num_new
        counts["padding_tokens"] += plan.shape.num_tokens - num_new
        counts["last_iteration_tokens"] = num_new
        for request in plan.requests:
            if request.group.first_scheduled is None:
                request.group.first_scheduled = step.dispatched
            if not request.is_counted:
                request.is_counted = True
                counts["prompt_tokens"] += request.num_prompt

    def stats(self) -> EngineStats:
        """Returns all counts as they are now."""
        scheduler, memory = self.scheduler, self._memory
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_swapped=memory.num_swapped,
            kv_cache_usage=memory.usage,
            kv_cache_waste=memory.waste(scheduler.running),
            prefix_cache_queries=memory.num_queries,
            prefix_cache_hits=memory.num_hits,
            num_preemptions=scheduler.num_preemptions,
            num_swaps=scheduler.num_swaps,
            device_time_s=self._device_clock.busy_s,
            idle_gap_s=self._device_clock.idle_s,
            num_compiles=self._compiles.num_compiles - self._num_compiles_before,
            **self._counts,
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant does not hold."""
        self.scheduler.check_integrity()


_COUNTS = (
    "prompt_tokens",
    "generation_tokens",
    "num_steps",
    "num_failed_steps",
    "last_iteration_tokens",
    "padding_tokens",
    "computed_tokens",
)
