"""Whether one more request may wait, and when to come back where it may not.

Knows no engine and no HTTP. The one idea: what a request may cost is known before it is queued (its prompt, and the
tokens it may generate), so that a refusal comes at once and says how long the queue is in seconds, by the rate at which
tokens have been processed lately.
"""

from __future__ import annotations

import dataclasses
import math

from fastgpt_jax.serving.unavailable import Overloaded

MEMORY_S = 20.0
"""Busy seconds after which a measured rate counts by 1/e."""
MAX_RETRY_AFTER_S = 60
LENGTH_WEIGHT = 0.1
"""How much the newest finished request moves the expected length of an answer."""


class RateMeter:
    """Tokens per busy second, the recent ones counting more."""

    def __init__(self):
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Counts tokens that took so long."""
        decay = math.exp(-max(seconds, 0.0) / MEMORY_S)
        self._tokens = self._tokens * decay + num_tokens
        self._seconds = self._seconds * decay + seconds

    @property
    def tokens_per_s(self) -> float | None:
        """The rate; None before anything was counted."""
        return self._tokens / self._seconds if self._tokens > 0 and self._seconds > 0 else None


@dataclasses.dataclass
class _Held:
    """What one request holds: sequences until it ends, prompt tokens of the queue until its first answer."""

    num_sequences: int
    num_queued_tokens: int
    num_expected: float


class Admission:
    """Counts what was let in and has not ended.

    Invariants: `num_sequences` and `num_queued_tokens` are the sums over the requests and rooms held, 0 without any.
    """

    def __init__(self, *, max_running: int, max_queue_len: int, max_queued_tokens: int):
        """Args: max_running: Sequences that run together; those beyond wait, `max_queue_len` of them."""
        self._max_running = max_running
        self._max_queue_len = max_queue_len
        self._max_queued_tokens = max_queued_tokens
        self._held: dict[object, _Held] = {}
        self._mean_length: float | None = None
        self.rate = RateMeter()
        self.num_sequences = 0
        self.num_queued_tokens = 0

    def check(self, num_sequences: int, num_tokens: int = 0) -> None:
        """Raises Overloaded where a request of so many sequences and prompt tokens may not wait.

        What nothing waits before is let in whatever its size: it was checked against the context already.
        """
        waiting = self.num_sequences + num_sequences - self._max_running
        if self._held and waiting > self._max_queue_len:
            raise self._overloaded(f"{max(self.num_sequences - self._max_running, 0)} sequences wait already")
        if self.num_queued_tokens and self.num_queued_tokens + num_tokens > self._max_queued_tokens:
            raise self._overloaded(f"{self.num_queued_tokens} prompt tokens wait already")

    def reserve(self, num_sequences: int, num_tokens: int) -> object:
        """Counts room for requests that are let in together, and returns it; it is removed as a request is."""
        self.check(num_sequences, num_tokens)
        room = object()
        self._held[room] = _Held(num_sequences, num_tokens, 0.0)
        self.num_sequences += num_sequences
        self.num_queued_tokens += num_tokens
        return room

    def add(
        self, request_id: str, num_sequences: int, num_tokens: int, max_tokens: int, room: object | None = None
    ) -> None:
        """Counts a request.

        Args:
          max_tokens: What each of its sequences may generate.
          room: Was reserved for it and others, and holds less from now on.
        """
        reserved = self._held.get(room)
        if reserved is not None:
            self._shrink(reserved, num_sequences, num_tokens)
        expected = max_tokens if self._mean_length is None else min(max_tokens, self._mean_length)
        self._held[request_id] = _Held(num_sequences, num_tokens, expected * num_sequences)
        self.num_sequences += num_sequences
        self.num_queued_tokens += num_tokens

    def start(self, request_id: str) -> None:
        """The first token is there: the prompt waits no more."""
        held = self._held.get(request_id)
        if held is not None:
            self.num_queued_tokens -= held.num_queued_tokens
            held.num_queued_tokens = 0

    def remove(self, request_id: object, num_generated: int | None = None) -> None:
        """Forgets a request; args: num_generated: tokens of each sequence, where it ran to its end."""
        held = self._held.pop(request_id, None)
        if held is None:
            return
        self.num_sequences -= held.num_sequences
        self.num_queued_tokens -= held.num_queued_tokens
        if num_generated is not None:
            mean = self._mean_length
            self._mean_length = num_generated if mean is None else mean + LENGTH_WEIGHT * (num_generated - mean)

    def _shrink(self, held: _Held, num_sequences: int, num_tokens: int) -> None:
        num_sequences, num_tokens = min(num_sequences, held.num_sequences), min(num_tokens, held.num_queued_tokens)
        held.num_sequences -= num_sequences
        held.num_queued_tokens -= num_tokens
        self.num_sequences -= num_sequences
        self.num_queued_tokens -= num_tokens

    @property
    def queue_s(self) -> float:
        """Seconds until what waits for its first token has been answered, by the measured rate; 0 where unknown."""
        rate = self.rate.tokens_per_s
        waiting = [held for held in list(self._held.values()) if held.num_queued_tokens]  # asked by other threads too
        work = sum(held.num_queued_tokens + held.num_expected for held in waiting)
        return 0.0 if rate is None else work / rate

    def _overloaded(self, why: str) -> Overloaded:
        retry_after_s = min(max(1, math.ceil(self.queue_s)), MAX_RETRY_AFTER_S)
        return Overloaded(f"the server is busy: {why}; try again in {retry_after_s} s", retry_after_s)
