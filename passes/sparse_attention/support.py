"""Where the keys lie that a mask can hold: a band around the query, and ranges that do not move.

The one idea: the answer may be too large and is never too small, so what lies outside need not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from passes.masks import And, KeyRange, Mask, Nothing, Offset, Or, all_of


@dataclass(frozen=True)
class Support:
    """Keys k of a query q with `lo <= q - k <= hi`, and those in some ranges.

    Attributes:
      band: (lo, hi), or None for no band.
      ranges: Ranges `[first, end)` of keys, ascending and apart.
    """

    band: tuple[int, int] | None
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def num_fixed(self) -> int:
        return sum(end - first for first, end in self.ranges)

    def num_rows(self, num_queries: int) -> int:
        """Keys that some of so many queries in a row may see."""
        return self.num_fixed + (self.band[1] - self.band[0] + num_queries if self.band is not None else 0)


def find_support(mask: Mask, beside: Sequence[Mask] = ()) -> Support | None:
    """The keys that a mask can hold, or None where there may be arbitrarily many.

    Args:
      beside: Intervals that hold too.
    """
    if isinstance(mask, Nothing):
        return Support(None)
    if isinstance(mask, Offset | KeyRange):
        together = all_of([mask, *(other for other in beside if type(other) is type(mask))])
        return _of_interval(together) if isinstance(together, Offset | KeyRange) else Support(None)
    if isinstance(mask, Or):
        parts = [find_support(term, beside) for term in mask.terms]
        known = [part for part in parts if part is not None]
        return _union(known) if len(known) == len(parts) else None
    if isinstance(mask, And):
        beside = [*beside, *(term for term in mask.terms if isinstance(term, Offset | KeyRange))]
        known = [part for term in mask.terms if (part := find_support(term, beside)) is not None]
        return min(known, key=lambda part: part.num_rows(1)) if known else None
    return None


def _of_interval(mask: Offset | KeyRange) -> Support | None:
    if isinstance(mask, Offset):
        return None if mask.lo is None or mask.hi is None else Support((mask.lo, mask.hi))
    first = max(mask.lo or 0, 0)
    return None if mask.end is None else Support(None, ((first, mask.end),) if first < mask.end else ())


def _union(parts: Sequence[Support]) -> Support:
    bands = [part.band for part in parts if part.band is not None]
    band = (min(lo for lo, _ in bands), max(hi for _, hi in bands)) if bands else None
    joined: list[tuple[int, int]] = []
    for first, end in sorted(r for part in parts for r in part.ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return Support(band, tuple(joined))
