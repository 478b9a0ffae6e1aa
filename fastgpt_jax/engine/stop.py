"""Stop strings: where a text ends, and how much of a growing text is safe to show.

Knows text alone, no tokens. The one idea: text is judged as if its characters arrived one by one, so that the outcome
does not depend on how they are grouped into tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class StopMatch:
    """A stop string and where it begins in the text, in characters."""

    stop: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.stop)


def find_stop(text: str, stops: Sequence[str], num_seen: int = 0, not_before: int = 0) -> StopMatch | None:
    """Finds the stop string that is complete first; of those complete at the same character, the longest.

    Args:
      num_seen: Characters already searched without success; a match must end past them.
      not_before: Matches that begin before this character do not count.
    """
    matches = []
    for stop in stops:
        start = text.find(stop, max(num_seen - len(stop) + 1, not_before, 0))
        if start >= 0:
            matches.append(StopMatch(stop, start))
    return min(matches, key=lambda match: (match.end, match.start), default=None)


def visible_length(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters no stop string can still swallow: all but the longest suffix that begins one."""
    longest = max((len(stop) for stop in stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        suffix = text[-length:]
        if any(stop.startswith(suffix) for stop in stops):
            return len(text) - length
    return len(text)
