"""Which pages hold the rows of which tokens, so that a prompt that begins as an earlier one need not be computed again.

Knows no device. The one idea: full pages are shared by name (`page_keys.py`). A program that carries values from token
to token can go on only from a page end at which these were saved: a snapshot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence, Set
from typing import Any

from fastgpt_jax.engine.page_pool import PagePool


class PrefixCache:
    """Names of pages, and of snapshots.

    Invariants: a name belongs to one page and a page has at most one name; a page with a name is referred to or kept;
    there are at most `max_snapshots` snapshots, the first of which was used longest ago.
    """

    def __init__(self, num_pages: int, *, max_snapshots: int):
        self.pool = PagePool(num_pages, self._evict)
        self._max_snapshots = max_snapshots
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._snapshots: OrderedDict[bytes, Any] = OrderedDict()

    def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Returns the page of each name, None where there is none; to be shared before anything else is asked for."""
        return [self._page_of.get(key) for key in keys]

    @property
    def named(self) -> Set[int]:
        """Pages whose rows are known by name."""
        return self._key_of.keys()

    def name(self, key: bytes, page: int) -> None:
        """Names a full page; where another page has the name already, that one keeps it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> list[int]:
        """Takes a reference from each page; returns those whose rows nobody can ask for any more."""
        return self.pool.release(pages, self._key_of)

    def has_snapshot(self, key: bytes) -> bool:
        return key in self._snapshots

    def snapshot(self, key: bytes) -> Any:
        """Returns what was carried at a page end, and marks it as used."""
        self._snapshots.move_to_end(key)
        return self._snapshots[key]

    def save_snapshot(self, key: bytes, carried: Any) -> None:
        """Keeps what is carried at a page end, in place of what was used longest ago where there are too many."""
        self._snapshots[key] = carried
        self._snapshots.move_to_end(key)
        if not self._snapshots.keys() <= self._page_of.keys():
            raise RuntimeError("a snapshot belongs to no page")
        if len(self._snapshots) > self._max_snapshots:
            self._snapshots.popitem(last=False)

    def drop_snapshot(self, key: bytes) -> None:
        """Forgets a snapshot, if it is there."""
        self._snapshots.pop(key, None)

    def clear(self) -> None:
        """Forgets all names and snapshots; pages that nobody refers to become blank."""
        for page in list(self.pool.kept):
            self.pool.forget(page)
        self._page_of.clear()
        self._key_of.clear()
        self._snapshots.clear()

    def _evict(self, page: int) -> None:
        key = self._key_of.pop(page)
        del self._page_of[key]
        self._snapshots.pop(key, None)

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant does not hold."""
        self.pool.check_integrity()
        if {page: key for key, page in self._page_of.items()} != self._key_of:
            raise RuntimeError("the names of pages and the pages of names disagree")
        if {page for page in self._key_of if not self.pool.counts[page]} != set(self.pool.kept):
            raise RuntimeError("the free pages with a name are not those that are kept")
        if not self._snapshots.keys() <= self._page_of.keys():
            raise RuntimeError("a snapshot belongs to no page")
        if len(self._snapshots) > self._max_snapshots:
            raise RuntimeError(f"{len(self._snapshots)} snapshots are kept and {self._max_snapshots} allowed")
