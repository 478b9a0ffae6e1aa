"""Who runs next, and how many of their tokens: admission, prefill in chunks, decode.

Knows no device, no text and no sampling. The one idea: a step is one rectangular call, a prefill of one bucket or a
decode of all; the two take turns while both are due, so that neither a long prompt nor a long answer starves the other.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence

from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.engine.request import Request
from fastgpt_jax.engine.slots import SlotPool


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of a compiled step.

    Invariants: `rows` has the length the entry point was compiled for, idle rows are None and carry no tokens;
    `0 < num_new[r] <= chunk_len` for the others; `slots` of requests are distinct, and 0 for idle rows.
    """

    rows: tuple[Request | None, ...]
    num_new: tuple[int, ...]
    slots: tuple[int, ...]
    chunk_len: int

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests that run, in order of rows."""
        return tuple(request for request in self.rows if request is not None)


class Scheduler:
    """Orders requests first come, first served.

    Invariants: a request is in `waiting` or holds a slot in `running`, never both; nothing finished is in either.
    """

    def __init__(self, num_slots: int, buckets: Buckets):
        """Args: buckets: Shapes of the steps there are."""
        self._buckets = buckets
        self._slots = SlotPool(num_slots)
        self._was_prefill = False
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.waiting.append(request)

    def remove(self, requests: Iterable[Request]) -> None:
        """Forgets finished or aborted requests, wherever they are, and frees their slots at once."""
        gone = set(map(id, requests))
        self.waiting = deque(request for request in self.waiting if id(request) not in gone)
        for slot, request in list(self.running.items()):
            if id(request) in gone:
                del self.running[slot]
                self._slots.release(slot)
                request.slot = None

    def admit(self) -> list[Request]:
        """Gives free slots to waiting requests; returns those admitted."""
        admitted = []
        while self.waiting and self._slots.num_free:
            request = self.waiting.popleft()
            request.slot = self._slots.acquire()
            self.running[request.slot] = request
            admitted.append(request)
        return admitted

    def next_batch(self) -> Batch | None:
        """Returns the next call, or None where no admitted request has anything to compute."""
        prefilling = [request for request in self.running.values() if request.is_prefilling]
        decoding = [request for request in self.running.values() if not request.is_prefilling]
        self._was_prefill = bool(prefilling) and not (decoding and self._was_prefill)
        if self._was_prefill:
            return self._prefill(prefilling)
        return self._decode(decoding) if decoding else None

    def _prefill(self, requests: Sequence[Request]) -> Batch:
        """Batches the oldest request's chunk with others of its bucket where at least half of the rows are used."""
        chunk_len = self._bucket(requests[0])
        same = [request for request in requests if self._bucket(request) == chunk_len]
        rows = self._buckets.prefill_rows(chunk_len)
        num_rows = max((n for n in rows if 2 * len(same) >= n), default=rows[0])
        same = same[:num_rows]
        return self._batch((*same, *[None] * (num_rows - len(same))), chunk_len)

    def _decode(self, requests: Sequence[Request]) -> Batch:
        """Decodes every request that can, in order of slots, in the smallest step that holds them."""
        num_rows = self._buckets.decode_rows(len(requests))
        in_order = sorted(requests, key=lambda request: request.page)
        return self._batch((*in_order, *[None] * (num_rows - len(requests))), 1)

    def _bucket(self, request: Request) -> int:
        """Returns the smallest bucket that holds the rest of the prompt, or the largest there is."""
        chunk_lens = self._buckets.chunk_lens
        return next((chunk_len for chunk_len in chunk_lens if chunk_len >= _num_left(request)), chunk_lens[-1])

    def _batch(self, rows: tuple[Request | None, ...], chunk_len: int) -> Batch:
        """Adds to every row its request's slot; what an idle row names is not used."""
        return Batch(
            rows=rows,
            num_new=tuple(0 if request is None else max(1, min(_num_left(request), chunk_len)) for request in rows),
            slots=tuple(0 if request is None else request.page for request in rows),
            chunk_len=chunk_len,
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant does not hold."""
        self._slots.check_integrity()
        if self._slots.held != frozenset(self.running):
            raise RuntimeError(f"slots held {sorted(self._slots.held)} are not those running {sorted(self.running)}")
        for slot, request in self.running.items():
            if request.slot != slot or request.is_finished:
                raise RuntimeError(f"slot {slot} runs a request that is finished or believes to be in {request.slot}")
            if not request.is_prefilling and request.num_cached != request.num_tokens - 1:
                raise RuntimeError(f"slot {slot} caches {request.num_cached} of {request.num_tokens} tokens")
        for request in self.waiting:
            if request.slot is not None or request.num_cached or request.is_finished:
                raise RuntimeError(f"a waiting request holds slot {request.slot} and {request.num_cached} tokens")


def _num_left(request: Request) -> int:
    """Returns the prompt tokens still to be computed, none or fewer while decoding."""
    return len(request.prompt_token_ids) - request.num_cached
