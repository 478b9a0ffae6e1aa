"""The pages of the caches: which are free, who refers to them, and which of the free ones still hold known rows.

Knows no tokens and no device. The one idea: a page that nobody refers to is free, whether or not its rows may be wanted
again; it is handed out last, and the one that was wanted longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Set


class PagePool:
    """Counts references to pages.

    Attributes:
      counts: For each page how many refer to it; for reading.

    Invariants: a page is referred to, or blank (in `_blank`), or kept (in `_kept`), and only one of these; a kept page
    is a free one whose rows somebody knows by name; the first of `_kept` was released longest ago.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]):
        """Args: on_evict: Told of a kept page before it is handed out, so that its rows are forgotten."""
        self.num_pages = num_pages
        self._on_evict = on_evict
        self.counts = [0] * num_pages
        self._blank = deque(range(num_pages))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that can be had, kept ones included."""
        return len(self._blank) + len(self._kept)

    @property
    def num_held(self) -> int:
        """Pages that somebody refers to."""
        return self.num_pages - self.num_free

    @property
    def kept(self) -> Set[int]:
        """The free pages whose rows are known by name."""
        return self._kept.keys()

    def acquire(self, num_pages: int) -> list[int]:
        """Takes pages, each with one reference; raises RuntimeError where there are not so many."""
        if num_pages > self.num_free:
            raise RuntimeError(f"{num_pages} pages were wanted and {self.num_free} are free; ask num_free first")
        return [self._take() for _ in range(num_pages)]

    def _take(self) -> int:
        if self._blank:
            page = self._blank.popleft()
        else:
            page, _ = self._kept.popitem(last=False)
            self._on_evict(page)
        self.counts[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each page, which is referred to or kept."""
        for page in pages:
            if not self.counts[page]:
                if page not in self._kept:
                    raise RuntimeError(f"page {page} is blank and cannot be shared")
                del self._kept[page]
            self.counts[page] += 1

    def release(self, pages: Iterable[int], named: Container[int]) -> list[int]:
        """Takes a reference from each page; returns those that became blank.

        The last page of a request goes first, since a prefix is worth more than what follows it.

        Args:
          named: Pages whose rows are known by name, which are kept.
        """
        blank = []
        for page in reversed(list(pages)):
            if not self.counts[page]:
                raise RuntimeError(f"page {page} is not referred to and was released")
            self.counts[page] -= 1
            if self.counts[page]:
                continue
            if page in named:
                self._kept[page] = None
            else:
                self._blank.append(page)
                blank.append(page)
        return blank

    def forget(self, page: int) -> None:
        """Makes a kept page blank; its rows are known no longer."""
        del self._kept[page]
        self._blank.append(page)

    def check_integrity(self) -> None:
        """Raises RuntimeError where an invariant does not hold."""
        if min(self.counts, default=0) < 0:
            raise RuntimeError("a page has fewer than no references")
        held = [page for page, count in enumerate(self.counts) if count]
        if sorted([*held, *self._blank, *self._kept]) != list(range(self.num_pages)):
            raise RuntimeError(
                f"pages are lost or doubled: {len(held)} held, {len(self._blank)} blank, {len(self._kept)} kept "
                f"of {self.num_pages}"
            )
