"""What a served program keeps between steps, as plain data: the compiler writes it, the engine reads it."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Literal

MAX_TRANSFER_PAGES = 8
"""Pages that one call moves: enough to be worth a call, few enough to cost little where a single one is copied."""
SNAPSHOTS_PER_REQUEST = 2
"""Copies of windows and carried values that are kept for prompts to come, for each request that may run."""


@dataclass(frozen=True)
class Reach:
    """Rows that a step reads for a new token at position p: from `p - window + 1` on, and the first `num_first`."""

    window: int
    num_first: int = 0

    def __or__(self, other: Reach) -> Reach:
        """What covers both."""
        return Reach(max(self.window, other.window), max(self.num_first, other.num_first))

    def dead_pages(self, num_rows: int, page_size: int) -> range:
        """Pages that are read neither for the token at position `num_rows` nor for later ones."""
        first, end = -(-self.num_first // page_size), (num_rows - self.window + 1) // page_size
        return range(first, max(first, end))


@dataclass(frozen=True)
class CacheEntry:
    """One cached value.

    Attributes:
      name: `kind` and a number, unique in the layout.
      kind: 'kv' keeps a row a token in pages; 'window' the last rows of a request; 'carry' one value of a request.
      shape: For 'kv' the shape of a row; else the whole shape.
      dtype: Of what is stored, as JAX spells it.
      layers: How many layers it is stacked over; each has a part of its own.
      nbytes: With scales, bytes a token over all layers for 'kv', else bytes a request.
      source: The user's source line of the value, file name and line.
      scale_dtype: Where rows are stored rounded, of the scale that each vector of their last axis has beside it; None
        where they are stored as they are.
      reach: Of 'kv', the rows that matter to new tokens; None where all do.
    """

    name: str
    kind: Literal["kv", "window", "carry"]
    shape: tuple[int, ...]
    dtype: str
    layers: int
    nbytes: int
    source: str
    scale_dtype: str | None = None
    reach: Reach | None = None


@dataclass(frozen=True)
class CacheLayout:
    """All cached values of a program.

    Attributes:
      page_size: Z, the tokens a page holds.
      num_pages: P, the pages of every pool.
      form: 'ragged' programs keep nothing but 'kv' rows, so several rows of one step may belong to one request, at
        consecutive positions; 'rectangular' ones take each request once in a step.
    """

    entries: tuple[CacheEntry, ...]
    page_size: int
    num_pages: int
    form: Literal["ragged", "rectangular"]

    def pages_per_request(self, max_model_len: int) -> int:
        """M, the pages that a request of so many tokens takes."""
        return -(-max_model_len // self.page_size)

    @property
    def reach(self) -> Reach | None:
        """The rows that matter to new tokens, in all caches that share pages; None where all do."""
        reaches = [entry.reach for entry in self.entries if entry.kind == "kv"]
        known = [reach for reach in reaches if reach is not None]
        return functools.reduce(operator.or_, known) if known and len(known) == len(reaches) else None

    @property
    def transfer_pages(self) -> int:
        """K, the pages that a call of a transfer program moves."""
        return min(MAX_TRANSFER_PAGES, self.num_pages)

    @property
    def num_pool_arrays(self) -> int:
        """Arrays of the state that hold pages; they come before those of windows and carried values."""
        return sum(1 if e.scale_dtype is None else 2 for e in self.entries if e.kind == "kv")

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a page in all pools together."""
        return self.page_size * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes that one more token takes, all layers together."""
        return sum(e.nbytes for e in self.entries if e.kind == "kv")

    @property
    def bytes_per_request(self) -> int:
        """Bytes of windows and carried values that a request takes whatever its length."""
        return sum(e.nbytes for e in self.entries if e.kind != "kv")
