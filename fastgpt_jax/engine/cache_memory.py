"""Which request holds which pages and which slot, and how it gets and loses them.

Knows no policy: it is told whom to let in and whom to put out. The one idea: a request's pages are written by it alone
from `num_computed` on; whatever it did not compute itself it shares (full pages), or has a copy of (the page that it
goes on writing). Pages that the model's windows have left behind are given back, as if they had never been held.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence, Set

import numpy as np

from fastgpt_jax.artifact.cache_layout import Reach
from fastgpt_jax.engine.device_caches import DeviceCaches
from fastgpt_jax.engine.prefix_cache import PrefixCache
from fastgpt_jax.engine.request import Request
from fastgpt_jax.engine.slots import SlotPool


@dataclasses.dataclass(frozen=True)
class _Found:
    """Rows that a request need not compute.

    Attributes:
      shared: Full pages to share; None for those that nobody will read.
      source: A page to copy, which the request then goes on writing; None where it begins a page of its own.
      num_rows: Rows that there are.
      snapshot: Name of what is carried at the end of `shared`; None where nothing is.
    """

    shared: tuple[int | None, ...] = ()
    source: int | None = None
    num_rows: int = 0
    snapshot: bytes | None = None


class CacheMemory:
    """Pages, slots and saved rows of requests.

    Invariants: the references to a page are the requests that hold it; pages past `num_computed // page_size` of a
    request are held by it alone and have no name; a request holds all pages that are there but for dead ones;
    `table[slot]` begins with the pages of the request that holds it, and where it gave one back stands another of its
    own, whose rows are read and hidden; rows saved on the host take no more than `swap_bytes`.
    """

    def __init__(
        self,
        caches: DeviceCaches,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        pages_per_request: int,
        min_first_chunk: int,
        reach: Reach | None = None,
        has_prefix_cache: bool = True,
        max_snapshots: int = 0,
        swap_bytes: int = 0,
        poisons: bool = False,
    ):
        """Args: reach: The rows that matter to new tokens; None where all do."""
        self.page_size = page_size
        self.prefixes = PrefixCache(num_pages, max_snapshots=max_snapshots)
        self.slots = SlotPool(num_slots)
        self.table = np.zeros((num_slots, pages_per_request), np.int32)
        self.num_queries = self.num_hits = 0
        self._pool = self.prefixes.pool
        self._caches = caches
        self._min_first_chunk = min_first_chunk
        self._reach = reach
        self._has_prefix_cache = has_prefix_cache
        self._poisons = poisons
        self._swap_bytes = swap_bytes
        self._swapped: dict[int, int] = {}

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    @property
    def num_swapped(self) -> int:
        """Requests whose rows lie on the host."""
        return len(self._swapped)

    @property
    def usage(self) -> float:
        """Share of the pages that requests hold."""
        return self._pool.num_held / self._pool.num_pages

    def waste(self, holders: Iterable[Request]) -> float:
        """Share of the places for rows in pages that requests hold where there is no row: the ends of their last pages.

        Args:
          holders: All requests that hold pages.
        """
        num_empty = sum(len(request.pages) * self.page_size - request.num_computed for request in holders)
        return num_empty / (self._pool.num_held * self.page_size) if self._pool.num_held else 0.0

    def num_pages(self, num_rows: int) -> int:
        """Pages that so many rows take."""
        return -(-num_rows // self.page_size)

    def num_held_only_by(self, requests: Iterable[Request]) -> int:
        """Pages that would be free without these requests."""
        references = Counter(page for request in requests for page in request.held_pages)
        return sum(self._pool.counts[page] == count for page, count in references.items())

    def admit(self, request: Request, num_spare: int) -> bool:
        """Gives a request a slot and the pages of all rows that its next token needs, if there are enough.

        Args:
          num_spare: Pages that must be left.
        """
        if not self.slots.num_free:
            return False
        if request.saved is not None:
            return self._bring_back(request, num_spare)
        found = self._find(request)
        # The copied page needs its source beside it for a moment; where that is one page too many, it is computed.
        options = [found] if found.source is None else [found, self._without_copy(found)]
        for option in options:
            if self._take(request, option, num_spare):
                return True
        return False

    def grow(self, request: Request) -> bool:
        """Adds the pages of all rows that a request's next token needs, if there are enough."""
        num_more = self.num_pages(request.num_wanted) - len(request.pages)
        if num_more > self._pool.num_free:
            return False
        if num_more > 0:
            self._hold(request, self._pool.acquire(num_more))
        return True

    def release(self, request: Request) -> None:
        """Takes pages, slot and saved rows from a request at once; what is known by name may still be found."""
        if request.saved is not None:
            self._forget_saved(request)
        if request.slot is not None:
            self._give_back(request.held_pages)
            self.slots.release(request.slot)
        request.slot, request.pages = None, []
        request.num_computed = request.num_named = 0

    def can_save(self, request: Request) -> bool:
        """Whether the host has room for a request's rows."""
        return sum(self._swapped.values()) + self._saved_bytes(request) <= self._swap_bytes

    def save(self, request: Request) -> None:
        """Moves a request's rows to the host."""
        if request.slot is None:
            raise RuntimeError("a request without a slot has nothing to save")
        num_bytes, num_computed = self._saved_bytes(request), request.num_computed
        pages = [page for index in self._live_pages(num_computed) if (page := request.pages[index]) is not None]
        saved = self._caches.save(pages, request.slot)
        self.release(request)
        request.saved, request.num_computed = saved, num_computed
        self._swapped[id(request)] = num_bytes

    def name_pages(self, request: Request) -> None:
        """Names the pages that a request has filled; to be called when the steps that fill them are under way."""
        num_full = min(request.num_computed, request.num_tokens) // self.page_size
        if not self._has_prefix_cache or request.slot is None:
            return
        if num_full > request.num_named:
            keys = request.page_keys(num_full)
            for index in range(request.num_named, num_full):
                if (page := request.pages[index]) is not None:
                    self.prefixes.name(keys[index], page)
            request.num_named = num_full
        if num_full * self.page_size == request.num_computed and self.keeps_carried(request.num_computed):
            key, page = request.page_keys(num_full)[-1], request.pages[num_full - 1]
            if page is not None:
                self.prefixes.name(key, page)  # another page had the name, and may have gone since
            if None not in self.prefixes.find([key]):
                self._save_snapshot(request, key)

    def free_dead_pages(self, request: Request) -> None:
        """Gives back the pages that no later step of a request reads; to be called when those before are under way."""
        if request.slot is None:
            return
        dead = self._dead_pages(request.num_computed)
        pages = [page for page in request.pages[dead.start : dead.stop] if page is not None]
        if pages:
            request.pages[dead.start : dead.stop] = [None] * len(dead)
            self._give_back(pages)
            self._write_table(request, dead.start)

    def keeps_carried(self, num_rows: int) -> bool:
        """Whether what is carried is saved when a request has so many rows."""
        return self._caches.has_carried and self._has_prefix_cache and num_rows > 0 and num_rows % self.page_size == 0

    def last_page_end(self, request: Request) -> int:
        """Where a chunk should end, so that what is carried is saved for requests that begin alike; 0 for nowhere."""
        if not (self._caches.has_carried and self._has_prefix_cache):
            return 0
        return (request.num_wanted - 1) // self.page_size * self.page_size

    def reset(self, requests: Iterable[Request]) -> None:
        """Begins with empty caches: whoever holds pages loses them, and nothing is known by name."""
        self._caches.reset()
        for request in requests:
            if request.slot is not None:
                self.release(request)
        self.prefixes.clear()

    def _find(self, request: Request) -> _Found:
        """Looks for rows that a request need not compute: its sibling's, or those known by name."""
        if not request.is_scored:
            return _Found()
        sibling = request.group.requests[0]
        num_usable = request.num_wanted - 1
        if sibling is not request and not self._caches.has_carried and not request.output_token_ids:
            num_rows = min(sibling.num_computed, num_usable) if sibling.slot is not None else 0
            if num_rows >= max(self._min_first_chunk, 1) and self._has_live(sibling.pages, num_rows):
                return self._split(sibling.pages, num_rows)
        if not self._has_prefix_cache:
            return _Found()
        keys = request.page_keys(request.num_tokens // self.page_size)
        pages = self.prefixes.find(keys)
        if self._caches.has_carried:
            del pages[num_usable // self.page_size :]
        if self._reach is None and None in pages:
            del pages[pages.index(None) :]
        for num_pages in range(len(pages), 0, -1):
            num_rows = min(num_pages * self.page_size, num_usable)
            if num_rows < max(self._min_first_chunk, 1):
                break
            snapshot = keys[num_pages - 1] if self._caches.has_carried else None
            if snapshot is not None and not self.prefixes.has_snapshot(snapshot):
                continue
            if self._has_live(pages, num_rows):
                return dataclasses.replace(self._split(pages, num_rows), snapshot=snapshot)
        return _Found()

    def _dead_pages(self, num_rows: int) -> range:
        """Pages of a request that nobody will read when so many of its rows are there."""
        return range(0) if self._reach is None else self._reach.dead_pages(num_rows, self.page_size)

    def _has_live(self, pages: Sequence[int | None], num_rows: int) -> bool:
        """Whether all pages are there that a request reads who goes on after so many rows."""
        return all(pages[index] is not None for index in self._live_pages(num_rows))

    def _live_pages(self, num_rows: int) -> list[int]:
        """Pages of a request that may be read when so many of its rows are there."""
        dead, num_pages = self._dead_pages(num_rows), self.num_pages(num_rows)
        return [*range(min(dead.start, num_pages)), *range(dead.stop, num_pages)]

    def _split(self, pages: Sequence[int | None], num_rows: int) -> _Found:
        """Full pages are shared, but for dead ones, and a part of one is copied."""
        num_full, rest = divmod(num_rows, self.page_size)
        dead = self._dead_pages(num_rows)
        shared = tuple(None if index in dead else pages[index] for index in range(num_full))
        return _Found(shared, pages[num_full] if rest else None, num_rows)

    def _without_copy(self, found: _Found) -> _Found:
        num_rows = len(found.shared) * self.page_size
        is_enough = num_rows >= self._min_first_chunk and self._has_live(found.shared, num_rows)
        return _Found(found.shared, None, num_rows) if is_enough else _Found()

    def _take(self, request: Request, found: _Found, num_spare: int) -> bool:
        """Gives a request its slot and pages, with what was found in them."""
        held = [page for page in (*found.shared, found.source) if page is not None]
        self._pool.share(held)
        num_more = self.num_pages(request.num_wanted) - len(found.shared)
        if num_more + num_spare > self._pool.num_free:
            self.prefixes.release(held)
            return False
        request.slot = self.slots.acquire()
        own = self._pool.acquire(num_more)
        self._hold(request, [*found.shared, *own])
        if found.source is not None:
            try:
                self._caches.copy_page(found.source, own[0])
            finally:
                self.prefixes.release([found.source])
        if found.snapshot is not None:
            self._caches.write_carried(request.slot, self.prefixes.snapshot(found.snapshot))
        request.num_computed = found.num_rows
        request.num_named = len(found.shared)
        self._count(request, found)
        return True

    def _bring_back(self, request: Request, num_spare: int) -> bool:
        """Gives a request its saved rows again; pages that are still there by name are shared."""
        saved = request.saved
        if saved is None:
            raise RuntimeError("nothing was saved of this request")
        there, found = self._live_pages(request.num_computed), list[int | None]()
        if self._has_prefix_cache:
            found = self.prefixes.find(
                request.page_keys(min(request.num_computed, request.num_tokens) // self.page_size)
            )
        shared = {index: page for index in there if index < len(found) and (page := found[index]) is not None}
        self._pool.share(shared.values())
        places = [*there, *range(self.num_pages(request.num_computed), self.num_pages(request.num_wanted))]
        num_more = len(places) - len(shared)
        if num_more + num_spare > self._pool.num_free:
            self.prefixes.release(list(shared.values()))
            return False
        request.slot = self.slots.acquire()
        own = iter(self._pool.acquire(num_more))
        pages: list[int | None] = [None] * (places[-1] + 1)
        for index in places:
            pages[index] = shared[index] if index in shared else next(own)
        self._hold(request, pages)
        self._caches.restore(saved, [None if index in shared else pages[index] for index in there], request.slot)
        request.num_named = next((index for index in there if index not in shared), 0)
        self._forget_saved(request)
        return True

    def _hold(self, request: Request, pages: Sequence[int | None]) -> None:
        start = len(request.pages)
        request.pages.extend(pages)
        self._write_table(request, start)

    def _write_table(self, request: Request, start: int) -> None:
        """Writes the pages of a request from one on; in the place of dead ones another of its own."""
        filler = next(page for page in request.pages if page is not None)
        row = [filler if page is None else page for page in request.pages[start:]]
        self.table[request.slot, start : len(request.pages)] = row

    def _give_back(self, pages: list[int]) -> None:
        blank = self.prefixes.release(pages)
        if blank and self._poisons:
            self._caches.poison(blank)

    def _count(self, request: Request, found: _Found) -> None:
        if self._has_prefix_cache:
            self.num_queries += request.num_wanted
            self.num_hits += found.num_rows
        if request.group.first_scheduled is None:
            request.group.num_cached_tokens = found.num_rows

    def _save_snapshot(self, request: Request, key: bytes) -> None:
        """Keeps what is carried at a page end; of a request's output only the newest is worth its place."""
        if self.prefixes.has_snapshot(key) or request.slot is None:
            return
        if request.snapshot_key is not None:
            self.prefixes.drop_snapshot(request.snapshot_key)
        self.prefixes.save_snapshot(key, self._caches.read_carried(request.slot))
        request.snapshot_key = key if request.num_computed > request.num_prompt else None

    def _saved_bytes(self, request: Request) -> int:
        return self._caches.saved_bytes(len(self._live_pages(request.num_computed)))

    def _forget_saved(self, request: Request) -> None:
        request.saved = None
        del self._swapped[id(request)]

    def check_integrity(self, holders: Sequence[Request], others: Iterable[Request]) -> None:
        """Raises RuntimeError where an invariant does not hold.

        Args:
          holders: All requests that hold pages.
          others: All that wait.
        """
        self.prefixes.check_integrity()
        self.slots.check_integrity()
        references = Counter(page for request in holders for page in request.held_pages)
        if self._pool.counts != [references[page] for page in range(self._pool.num_pages)]:
            raise RuntimeError("the references to pages are not those of the requests that hold them")
        if self.slots.held != {request.slot for request in holders} or len(self.slots.held) != len(holders):
            raise RuntimeError(f"slots held {sorted(self.slots.held)} are not those of {len(holders)} requests")
        named = self.prefixes.named
        for request in holders:
            self._check_holder(request, named)
        saved = {id(request) for request in others if request.saved is not None}
        if saved != set(self._swapped) or sum(self._swapped.values()) > self._swap_bytes:
            raise RuntimeError("the rows on the host are not those of the requests that wait for them")
        for request in others:
            if request.slot is not None or request.pages or bool(request.num_computed) != (request.saved is not None):
                raise RuntimeError(f"a waiting request holds slot {request.slot} and pages {request.pages}")

    def _check_holder(self, request: Request, named: Set[int]) -> None:
        pages, num_computed = request.pages, request.num_computed
        held = request.held_pages
        is_whole = len(pages) >= self.num_pages(num_computed) and self._has_live(pages, num_computed)
        if not is_whole or len(set(held)) < len(held):
            raise RuntimeError(f"{num_computed} rows do not lie in pages {pages}")
        if self.table[request.slot, : len(pages)].tolist() != [held[0] if page is None else page for page in pages]:
            raise RuntimeError(f"the table of slot {request.slot} does not name the pages {pages}")
        for page in pages[num_computed // self.page_size :]:
            if page is None or self._pool.counts[page] != 1 or page in named:
                raise RuntimeError(f"page {page} will be written and is shared or known by name")
