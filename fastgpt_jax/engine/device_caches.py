"""The state that lives on the device, and what moves pages and carried values in, out and about.

Knows no requests and no policy. The one idea: the device works in the order it is given things, so a copy or a save
that is given after one step and before another sees exactly what the first left, and nobody waits for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fastgpt_jax.engine.compiled import CompiledModel


@dataclasses.dataclass(frozen=True)
class SavedRows:
    """Rows and carried values of a request, on the host.

    Attributes:
      pages: What `read_pages` gave, for as many pages at a time as it moves.
      carried: What `read_slot` gave.
      num_pages: Pages saved.
    """

    pages: tuple[Any, ...]
    carried: Any
    num_pages: int


class DeviceCaches:
    """Holds the state, and replaces it whenever it is donated.

    Invariants: `state` is never one that was donated.
    """

    def __init__(self, compiled: CompiledModel):
        self._compiled = compiled
        self._layout = compiled.layout
        self._has_carried = any(entry.kind != "kv" for entry in self._layout.entries)
        self._poison: Any = None
        self.state: Any = compiled.init_state()

    @property
    def has_carried(self) -> bool:
        """Whether requests carry values besides the rows in pages."""
        return self._has_carried

    def saved_bytes(self, num_pages: int) -> int:
        """What `save` takes of the host: whole transfers, the last of which may be of fewer pages."""
        size = self._layout.transfer_pages
        return -(-num_pages // size) * size * self._layout.bytes_per_page + self._layout.bytes_per_request

    def reset(self) -> None:
        """Begins anew with empty caches; what the state held is lost."""
        self.state = None
        self.state = self._compiled.init_state()

    def copy_page(self, source: int, target: int) -> None:
        """Copies the rows of a page."""
        sources, targets = (next(self._padded([page])) for page in (source, target))
        self.state = self._compiled.copy_pages(self.state, sources, targets)

    def save(self, pages: Sequence[int], slot: int) -> SavedRows:
        """Brings pages and what is carried to the host; waits for them."""
        rows = [self._compiled.read_pages(self.state, group) for group in self._padded(pages)]
        return SavedRows(tuple(jax.device_get(rows)), jax.device_get(self.read_carried(slot)), len(pages))

    def restore(self, saved: SavedRows, pages: Sequence[int | None], slot: int) -> None:
        """Brings saved rows back, into other pages and another slot.

        Args:
          pages: Where each page that was saved goes; None for nowhere, since its rows are there.
        """
        wanted = [self._layout.num_pages if page is None else page for page in pages]
        for group, rows in zip(self._padded(wanted), saved.pages, strict=True):
            if np.any(group < self._layout.num_pages):
                self.state = self._compiled.write_pages(self.state, group, rows)
        self.write_carried(slot, saved.carried)

    def read_carried(self, slot: int) -> Any:
        """What a request carries, as a copy that stays as it is."""
        return self._compiled.read_slot(self.state, np.int32(slot)) if self._has_carried else []

    def write_carried(self, slot: int, carried: Any) -> None:
        """Gives a slot what another request carried."""
        if self._has_carried:
            self.state = self._compiled.write_slot(self.state, np.int32(slot), carried)

    def poison(self, pages: Sequence[int]) -> None:
        """Overwrites pages that nobody may read with NaN, or the largest number where there is none."""
        for group in self._padded(pages):
            if self._poison is None:
                self._poison = [_worst(x) for x in jax.device_get(self._compiled.read_pages(self.state, group))]
            self.state = self._compiled.write_pages(self.state, group, self._poison)

    def _padded(self, pages: Sequence[int]) -> Iterator[np.ndarray]:
        """Groups of as many pages as one transfer moves; the last is filled up with a page that does not exist."""
        size = self._layout.transfer_pages
        for start in range(0, len(pages), size):
            group = np.full((size,), self._layout.num_pages, np.int32)
            group[: len(pages[start : start + size])] = pages[start : start + size]
            yield group


def _worst(like: np.ndarray) -> np.ndarray:
    """Numbers of this shape that show wherever they are read."""
    is_integer = np.issubdtype(like.dtype, np.integer)
    return np.full(like.shape, np.iinfo(like.dtype).max if is_integer else np.nan, like.dtype)
