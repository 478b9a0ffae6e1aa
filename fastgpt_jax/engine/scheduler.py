"""Who runs next, and how many of their tokens: admission, preemption, prefill in chunks, decode.

Knows no device, no text and no sampling. The one idea: requests are in one order, lower priority values and then
earlier arrivals first. Pages go to the first and are taken from the last, so the first of all always gets on; and what
equals have left of their prompts is served in turns.
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
from collections.abc import Iterator
from typing import Literal

from fastgpt_jax.engine.cache_memory import CacheMemory
from fastgpt_jax.engine.request import Request
from fastgpt_jax.engine.shapes import Filling, Item, Row, Shape, Shapes

How = Literal["swap", "recompute"]
"""How a request that lost its pages gets its rows again: brought back from the host, or computed."""


_order = operator.attrgetter("order")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call of a compiled step.

    Attributes:
      shape: The entry point.
      rows: Those in use, all of one request in order of position.
      samples: For each row whether it brings its request's next token.
      is_scored: Whether log-probabilities of prompts are wanted.
      is_independent: Whether all its tokens are known, whatever the steps under way bring.
      places: Where each of `rows` lies among the rows of the step; empty for the first ones. The rest are idle.
    """

    shape: Shape
    rows: tuple[Row, ...]
    samples: tuple[bool, ...]
    is_scored: bool
    is_independent: bool
    places: tuple[int, ...] = ()

    @property
    def follows(self) -> bool:
        """Whether its tokens are those that the step before it draws, each in the place of its row."""
        return bool(self.places)

    @property
    def placed(self) -> Iterator[tuple[int, Row, bool]]:
        """Each row with its place, and whether it brings its request's next token."""
        return zip(self.places or range(len(self.rows)), self.rows, self.samples, strict=True)

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests that run, each once."""
        return tuple(dict.fromkeys(row.request for row in self.rows))


@dataclasses.dataclass(frozen=True)
class Batching:
    """When requests begin to run, and how many.

    Attributes:
      max_running: Most that run together.
      min_batch: An idle engine waits until so many are there,
      timeout_s: or the oldest has waited so long.
    """

    max_running: int
    min_batch: int = 1
    timeout_s: float = 0.0


class Scheduler:
    """Orders requests.

    Invariants: a request is in `waiting` and holds nothing but rows on the host, or in `running` and holds a slot and
    pages; both are in order; nothing finished is in either.
    """

    def __init__(self, memory: CacheMemory, shapes: Shapes, batching: Batching, max_model_len: int):
        self.memory = memory
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = self.num_swaps = 0
        self._shapes = shapes
        self._batching = batching
        self._max_model_len = max_model_len
        self._service = 0
        self._had_decodes = self._had_prompts = False
        self._admitted: list[Request] = []

    def add(self, request: Request) -> None:
        """Queues a request."""
        bisect.insort(self.waiting, request, key=_order)

    def remove(self, request: Request) -> None:
        """Forgets a finished request, wherever it is, and frees what it holds at once."""
        queue = self.waiting if request.slot is None else self.running
        _take_out(queue, request)
        self.memory.release(request)

    def preempt(self, request: Request, how: How) -> None:
        """Takes slot and pages from a running request, which waits again at its old place in the order."""
        self.num_preemptions += 1
        if how == "swap" and request.num_computed and self.memory.can_save(request):
            self.memory.save(request)
            self.num_swaps += 1
        else:
            self.memory.release(request)
        _take_out(self.running, request)
        self.add(request)

    def reset(self) -> None:
        """Has every running request wait again, with nothing computed: the caches were lost."""
        self.memory.reset((*self.running, *self.waiting))
        running, self.running = self.running, []
        for request in running:
            self.add(request)
        for request in self.waiting:
            request.num_awaited = 0
            if request.num_left < 1:
                self.memory.release(request)

    def seconds_until_due(self, now: float) -> float:
        """How long until requests that wait may begin; 0 where they may, or there are none."""
        batching = self._batching
        if self.running or not self.waiting or len(self.waiting) >= batching.min_batch:
            return 0.0
        oldest = min(request.group.arrival for request in self.waiting)
        return max(oldest + batching.timeout_s - now, 0.0)

    def schedule(self, now: float) -> Plan | None:
        """Returns the next call, or None where nobody has anything to compute."""
        self._grow()
        if not self.seconds_until_due(now):
            self._admit()
        filling = self._choose()
        return None if filling is None else self._plan(filling)

    def take_admitted(self) -> list[Request]:
        """Returns the requests that got a slot since it was last asked for them, and still have it."""
        admitted, self._admitted = self._admitted, []
        return [request for request in dict.fromkeys(admitted) if request.slot is not None]

    def _grow(self) -> None:
        """Gives decodes the page of their next row; where there is none, the last in the order loses its own."""
        for request in list(self.running):
            while request.slot is not None and not request.will_end(self._max_model_len):
                if self.memory.grow(request):
                    break
                self.preempt(self.running[-1], "swap")

    def _admit(self) -> None:
        """Lets waiting requests in, in order; the first that finds no place ends it, so that no large one starves."""
        index = 0
        while index < len(self.waiting):
            request = self.waiting[index]
            if _waits_for_sibling(request):
                index += 1
                continue
            if not self._has_place(request):
                return
            del self.waiting[index]
            bisect.insort(self.running, request, key=_order)
            request.service = max(request.service, self._service)
            self._admitted.append(request)

    def _has_place(self, request: Request) -> bool:
        """Gives a request its place, if need be that of others of higher priority values."""
        if self._try(request):
            return True
        lower = [other for other in self.running if other.order[0] > request.order[0]]
        num_pages = self.memory.num_free_pages + self.memory.num_held_only_by(lower)
        if not lower or num_pages < self.memory.num_pages(request.num_wanted) + len(self.running) - len(lower):
            return False
        while lower:
            self.preempt(lower.pop(), "swap")
            if self._try(request):
                return True
        return False

    def _try(self, request: Request) -> bool:
        """Lets a request in if there is room, and room for those that run to grow by a page."""
        return len(self.running) < self._batching.max_running and self.memory.admit(request, len(self.running))

    def _choose(self) -> Filling | None:
        """Takes decodes and prompts together where that is best, and else in turns."""
        items = [self._item(r) for r in self.running if not r.will_end(self._max_model_len)]
        decodes = [item for item in items if item.num_left == 1 and not item.is_scored]
        prompts = [item for item in items if item.num_left > 1 or item.is_scored]
        prompts.sort(key=lambda item: (item.request.order[0], item.request.service, item.request.order))
        needs_decodes = bool(decodes) and (not prompts or (self._had_prompts and not self._had_decodes))
        needs_prompts = bool(prompts) and not needs_decodes
        if prompts:
            self._service = max(self._service, prompts[0].request.service)
        filling = self._shapes.choose(decodes, prompts, needs_decodes=needs_decodes, needs_prompts=needs_prompts)
        if filling is not None:
            self._had_decodes, self._had_prompts = filling.decodes, filling.prefills
        return filling

    def _item(self, request: Request) -> Item:
        return Item(
            request,
            start=request.num_computed,
            num_left=request.num_left,
            page_end=self.memory.last_page_end(request),
            is_scored=not request.is_scored and request.num_computed < request.num_prompt - 1,
        )

    def _plan(self, filling: Filling) -> Plan:
        """Counts what will be computed as computed."""
        is_independent = not any(row.stop > row.request.num_tokens for row in filling.rows)
        is_scored = any(not r.request.is_scored and r.start < r.request.num_prompt - 1 for r in filling.rows)
        samples = tuple(row.stop == row.request.num_wanted for row in filling.rows)
        for row in filling.rows:
            request = row.request
            if row.num_new > 1 or row.stop < request.num_wanted:
                request.service += row.num_new
            request.num_computed = row.stop
        for row, is_last in zip(filling.rows, samples, strict=True):
            row.request.num_awaited += is_last
        return Plan(filling.shape, filling.rows, samples, is_scored, is_independent)

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant does not hold."""
        self.memory.check_integrity(self.running, self.waiting)
        for queue in (self.waiting, self.running):
            if [r.order for r in queue] != sorted(r.order for r in queue):
                raise RuntimeError("a queue is out of order")
            for request in queue:
                if request.finish_reason is not None or request.num_computed >= request.num_wanted:
                    raise RuntimeError(f"a request is finished, or {request.num_left} rows are left to it")
        if any(request.slot is None for request in self.running):
            raise RuntimeError("a running request holds no slot")


def _take_out(queue: list[Request], request: Request) -> None:
    """Removes a request from a queue that is in order."""
    index = bisect.bisect_left(queue, request.order, key=_order)
    if index == len(queue) or queue[index] is not request:
        raise RuntimeError("a request is not in the queue that it should be in")
    del queue[index]


def _waits_for_sibling(request: Request) -> bool:
    """Whether the first continuation of the prompt is about to compute rows that this one shares."""
    first = request.group.requests[0]
    if first is request or first.is_finished or request.saved is not None:
        return False
    return first.num_computed < first.num_prompt
