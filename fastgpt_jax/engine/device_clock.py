"""How long the device worked, and how long it waited for the host.

Knows no device. The one idea: a step ends when the host's wait for it ends. Where the host came late, the end lies
between the last time it was seen running and the first time it was seen done, and the shortest time that its entry
point ever took says where.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable


class DeviceClock:
    """Follows steps in the order in which they are given. All times are seconds of one clock."""

    def __init__(self):
        self.busy_s = 0.0
        self.idle_s = 0.0
        self._shortest: dict[Hashable, float] = {}
        self._under_way: deque[tuple[Hashable, float]] = deque()
        self._last_end: float | None = None
        self._seen_running = 0.0
        self._seen_done: float | None = None

    def start(self, key: Hashable, now: float) -> None:
        """A step was given to the device."""
        if not self._under_way and self._last_end is not None:
            self.idle_s += max(now - self._last_end, 0.0)
        self._under_way.append((key, now))

    def see(self, is_done: bool, now: float) -> None:
        """The oldest step under way is running, or done."""
        if not is_done:
            self._seen_running = now
        elif self._seen_done is None:
            self._seen_done = now

    def end(self, now: float) -> None:
        """The host has the results of the oldest step; it waited for them unless the step was seen done before."""
        key, given = self._under_way.popleft()
        start = given if self._last_end is None else max(given, self._last_end)
        if self._seen_done is None:
            end = now
            self._shortest[key] = min(self._shortest.get(key, end - start), end - start)
        else:
            guess = start + self._shortest.get(key, 0.0)
            end = min(max(guess, self._seen_running), self._seen_done)
        end = max(end, start)
        self.busy_s += end - start
        self._last_end, self._seen_done, self._seen_running = end, None, 0.0
        if self._under_way and self._under_way[0][1] > end:  # given after the one before had ended
            self.idle_s += self._under_way[0][1] - end

    def anew(self) -> DeviceClock:
        """A clock that goes on counting, and knows of no step under way."""
        clock = DeviceClock()
        clock.busy_s, clock.idle_s, clock._shortest = self.busy_s, self.idle_s, self._shortest
        return clock
