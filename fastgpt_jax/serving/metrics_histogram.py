"""A histogram that one thread fills and any thread reads, without a lock on the way of a token."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ITERATION_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


def token_buckets(most: int) -> tuple[float, ...]:
    """Returns 1, 2, 5, 10, 20 ... up to `most` tokens."""
    bounds = [step * 10**power for power in range(len(str(most))) for step in (1, 2, 5)]
    return tuple(float(bound) for bound in bounds if bound <= most)


class Histogram:
    """Counts by upper bounds. Invariant: `total` is the sum of what was observed, up to the reader's last glance."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value, as often as asked."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """Returns Prometheus' buckets: an upper bound, and how many values were not above it."""
        counts, seen = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), list(self._counts), strict=True):
            seen += count
            counts.append((bound, float(seen)))
        return counts
