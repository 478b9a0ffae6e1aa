"""Which steps a served model has: their shapes and kinds, as plain data.

The compiler writes it, the scheduler fills it, the artifact names its files by it. The one idea: an entry point is a
step of fixed shape, so a handful of shapes (buckets) serves every batch with some padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

Variant = Literal["greedy", "full"]


@dataclasses.dataclass(frozen=True, order=True)
class EntryPointKey:
    """What tells entry points apart.

    Attributes:
      num_tokens: T, padding included; a multiple of `num_requests`.
      num_requests: R, idle rows included.
      variant: 'greedy' takes the most likely token and reads nothing of the sampler's inputs; 'full' samples.
      score: Whether the log-probabilities of given tokens are computed too.
    """

    num_tokens: int
    num_requests: int
    variant: Variant
    score: bool

    @property
    def chunk_len(self) -> int:
        """Tokens of each request."""
        return self.num_tokens // self.num_requests

    @property
    def name(self) -> str:
        """Such as `decode-r8-greedy` or `prefill-r1-c64-full-score`; unique, and fit for a file name."""
        kind = "decode" if self.chunk_len == 1 else "prefill"
        chunk = "" if self.chunk_len == 1 else f"-c{self.chunk_len}"
        return f"{kind}-r{self.num_requests}{chunk}-{self.variant}" + ("-score" if self.score else "")


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes of steps that exist.

    Invariants: both ascend, and are not empty; `decode` ends with the number of requests that run together; for every
    chunk length of `prefill` there is an entry with one row.

    Attributes:
      prefill: Pairs of chunk length (tokens of each request) and rows (requests).
      decode: Rows.
    """

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[int, ...]

    @property
    def chunk_lens(self) -> tuple[int, ...]:
        """The chunk lengths of prefill, ascending."""
        return tuple(sorted({chunk_len for chunk_len, _ in self.prefill}))

    def prefill_rows(self, chunk_len: int) -> tuple[int, ...]:
        """The numbers of rows that a prefill of this chunk length exists for, ascending."""
        return tuple(rows for length, rows in self.prefill if length == chunk_len)

    def decode_rows(self, num_requests: int) -> int:
        """The smallest decode step that holds this many requests."""
        return next(rows for rows in self.decode if rows >= num_requests)

    def keys(self) -> Iterator[EntryPointKey]:
        """Every entry point: decode and prefill, greedy and full, and for prefill also full with scores."""
        for rows in self.decode:
            yield EntryPointKey(rows, rows, "greedy", False)
            yield EntryPointKey(rows, rows, "full", False)
        for chunk_len, rows in self.prefill:
            if chunk_len > 1:
                yield EntryPointKey(chunk_len * rows, rows, "greedy", False)
                yield EntryPointKey(chunk_len * rows, rows, "full", False)
            yield EntryPointKey(chunk_len * rows, rows, "full", True)
