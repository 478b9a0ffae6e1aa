"""What came of one request, and what many of them amount to.

The one idea: times are kept raw, a stamp for each piece of an answer as it arrived, and every figure follows from them:
TTFT is the first piece less the sending, TPOT (E2E - TTFT) / (tokens - 1), ITL each gap between pieces. A request that
failed or had an empty answer has no latency and is counted apart; one whose client left counts until it left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Record:
    """One request as its client saw it; times are seconds of one monotonic clock.

    Attributes:
      sent_s: When it was sent.
      piece_s: When each piece with text or tokens arrived.
      end_s: When the answer was whole, the client left or the error came.
      num_tokens: Generated, as the server counts.
      status: HTTP's; 0 where there was none.
      was_cancelled: The client left before the end, as it was told to.
    """

    sent_s: float
    piece_s: tuple[float, ...]
    end_s: float
    num_prompt: int
    num_tokens: int
    status: int
    was_cancelled: bool = False

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and not self.was_cancelled and bool(self.piece_s)

    @property
    def ttft_s(self) -> float:
        return self.piece_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token behind the first; None for an answer of one."""
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        return tuple(b - a for a, b in zip(self.piece_s, self.piece_s[1:], strict=False))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a good answer takes at most; None does not care."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def is_met(self, record: Record) -> bool:
        if not record.is_whole:
            return False
        in_time = self.ttft_s is None or record.ttft_s <= self.ttft_s
        return in_time and (self.tpot_s is None or (record.tpot_s or 0.0) <= self.tpot_s)


def summarize(records: Sequence[Record], objective: Objective = Objective()) -> dict[str, Any]:
    """Figures of a run: counts, rates over its whole time, and percentiles in milliseconds."""
    whole = [record for record in records if record.is_whole]
    begin, end = min(r.sent_s for r in records), max(r.end_s for r in records)
    seconds = max(end - begin, 1e-9)
    statuses: dict[str, int] = {}
    for record in records:
        statuses[str(record.status)] = statuses.get(str(record.status), 0) + 1
    return {
        "num_requests": len(records),
        "num_whole": len(whole),
        "num_cancelled": sum(r.was_cancelled for r in records),
        "num_failed": sum(r.status != 200 for r in records),
        "num_empty": sum(r.status == 200 and not r.piece_s and not r.was_cancelled for r in records),
        "statuses": statuses,
        "seconds": seconds,
        "requests_per_s": len(whole) / seconds,
        "prompt_tokens_per_s": sum(r.num_prompt for r in records if r.status == 200) / seconds,
        "output_tokens_per_s": sum(r.num_tokens for r in records) / seconds,
        "goodput_per_s": sum(map(objective.is_met, records)) / seconds,
        "ttft_ms": percentiles([r.ttft_s for r in whole]),
        "tpot_ms": percentiles([t for r in whole if (t := r.tpot_s) is not None]),
        "itl_ms": percentiles([gap for r in whole for gap in r.itl_s]),
        "e2e_ms": percentiles([r.e2e_s for r in whole]),
    }


def percentiles(seconds: Sequence[float]) -> Mapping[str, float] | None:
    """Percentiles in milliseconds; None of nothing."""
    if not seconds:
        return None
    found = np.percentile(np.asarray(seconds) * 1000, PERCENTILES)
    return {f"p{p}": round(float(value), 3) for p, value in zip(PERCENTILES, found, strict=True)}
