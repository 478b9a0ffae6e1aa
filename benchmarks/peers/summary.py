"""Rows of a run become figures: medians, what of the memory's limit was reached, and which line of the goal is met.

Knows no process and no text. The one idea: the table, the picture and the verdicts read the same summaries, made from
rows alone, so that a kept run can be told again.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.peers.contests import CONTESTS, MEASURES, OURS
from benchmarks.peers.parts import CONTEXTS, added_over_limit
from benchmarks.peers.shapes import SHAPES

Row = Mapping[str, Any]
SIZES = {measure.name: measure.size for measure in MEASURES}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A contestant at a measure.

    Attributes:
      tokens_a_second: Median over rounds.
      spread: The least and the most.
      share: Of what the bandwidth lets a decode reach, taken beside each round; of a prefill, what the run's fastest
        products would let it reach, None where these were not taken.
    """

    tokens_a_second: float
    spread: tuple[float, float]
    share: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A line of the goal: what was asked, what was found, whether that is enough."""

    text: str
    found: float
    asked: float
    is_most: bool = False

    @property
    def is_met(self) -> bool:
        return self.found <= self.asked if self.is_most else self.found >= self.asked


def of_shape(rows: Iterable[Row], shape: str) -> list[Row]:
    return [row for row in rows if row.get("shape") == shape]


def shapes_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows if "shape" in row))


def contests_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["contest"] for row in rows if row["row"] == "time"))


def contestants_of(rows: Iterable[Row], contest: str) -> list[str]:
    """In the order in which they first were timed, ours first."""
    labels = dict.fromkeys(r["contestant"] for r in rows if r["row"] == "time" and r["contest"] == contest)
    return sorted(labels, key=lambda label: not label.startswith(OURS))


def measures_of(rows: Iterable[Row]) -> list[str]:
    found = {row["measure"] for row in rows if row["row"] == "time"}
    return [measure.name for measure in MEASURES if measure.name in found]


def figure(rows: Sequence[Row], contest: str, contestant: str, measure: str) -> Figure | None:
    """None where it was not measured in every round."""
    if any(_is(row, "failed", contest, contestant, measure) for row in rows if "round" not in row) and not any(
        _is(row, "time", contest, contestant, measure) for row in rows
    ):
        return None
    times = [row for row in rows if _is(row, "time", contest, contestant, measure)]
    if not times:
        return None
    rates = [SIZES[measure] / row["seconds"] for row in times]
    if "decode" in measure:
        step_bytes = next(row["step_bytes"] for row in rows if row["row"] == "limit" and row["contest"] == contest)
        share = statistics.median(step_bytes / row["bandwidth"] / row["seconds"] for row in times)
    else:
        most = ceiling(rows, CONTESTS[contest].numbers)
        operations = SHAPES[times[0]["shape"]].prefill_operations
        share = None if most is None else statistics.median(rates) * operations / most
    return Figure(statistics.median(rates), (min(rates), max(rates)), share)


def ceiling(rows: Iterable[Row], numbers: str) -> float | None:
    """Operations a second of the fastest products of such numbers; None where they were not taken."""
    found = [row[numbers] for row in rows if row["row"] == "ceiling"]
    return statistics.median(found) if found else None


def limit(rows: Sequence[Row], contest: str, measure: str) -> float:
    """Tokens a second that a decode reaches whose weights come at the median bandwidth of the contest."""
    step_bytes = next(row["step_bytes"] for row in rows if row["row"] == "limit" and row["contest"] == contest)
    return SIZES[measure] * bandwidth(rows, contest) / step_bytes


def bandwidth(rows: Sequence[Row], contest: str) -> float:
    return statistics.median(r["bandwidth"] for r in rows if r["row"] == "time" and r["contest"] == contest)


def ratio(rows: Sequence[Row], contest: str, contestant: str, other: str, measure: str) -> float | None:
    """How much faster one is than another: the median over rounds of both figures of the same round."""
    pairs = [
        {r["round"]: r["seconds"] for r in rows if _is(r, "time", contest, c, measure)} for c in (contestant, other)
    ]
    shared = sorted(pairs[0].keys() & pairs[1].keys())
    return statistics.median(pairs[1][i] / pairs[0][i] for i in shared) if shared else None


GOALS = (
    ("int8", "decode 1", ("llama.cpp q8_0", "openvino int8"), 1.3),
    ("int4", "decode 1", ("llama.cpp q4_0", "openvino int4"), 1.4),
    ("int8", "decode 8", ("llama.cpp q8_0", "openvino int8"), 1.0),
    ("int8", "decode 32", ("llama.cpp q8_0", "openvino int8"), 1.0),
    ("int8", "prefill 512", ("openvino int8",), 1.0),
    ("int8", "prefill 512", ("ctranslate2 int8",), 1.0),
    *(
        (name, measure, (f"torch {name}",), 1.0)
        for name in ("bfloat16", "float32")
        for measure in ("decode 1", "decode 8", "decode 32", "prefill 512")
    ),
)
"""Contest, measure, whom to be ahead of, and by how much."""
SHARE_GOAL, CONTEXT_GOAL, NEIGHBOUR_GOAL = 0.7, 1.25, 0.65
FLOAT_GOAL = 1e-4


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The lines of the goal that a shape's rows say something about."""
    for contest, measure, others, asked in GOALS:
        for other in others:
            found = ratio(rows, contest, f"{OURS} {contest}", other, measure)
            if found is not None:
                yield Verdict(f"{contest}, {measure}: times {other}", found, asked)
    for contest in ("int8", "int4"):
        ours = figure(rows, contest, f"{OURS} {contest}", "decode 1")
        if ours is not None and ours.share is not None:
            yield Verdict(f"{contest}, decode 1: share of the read bandwidth", ours.share, SHARE_GOAL)
    exact = [row for row in rows if row["row"] == "exactness" and row["contest"] == "float32"]
    if exact:
        yield Verdict("float32: largest error of a log-probability", exact[-1]["logprob_error"], FLOAT_GOAL, True)
    yield from _context_verdicts(rows)
    yield from _neighbour_verdicts(rows)


def _context_verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    own = [row for row in rows if row["row"] == "context"]
    if not own or {row["tokens"] for row in own} != set(CONTEXTS):
        return
    ratios = added_over_limit(own, SHAPES[own[0]["shape"]].kv_bytes_a_token(4))
    for tokens, found in ratios.items():
        text = f"int8, {tokens:,} tokens before: time added over that of reading their keys and values"
        yield Verdict(text, found, CONTEXT_GOAL, True)


def _neighbour_verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    kept = neighbour_shares(rows)
    ours, other = kept.get(f"{OURS} int8"), kept.get("llama.cpp q8_0")
    if ours is not None:
        yield Verdict("int8, decode 1 beside a busy core: share of the idle rate", ours, NEIGHBOUR_GOAL)
    if ours is not None and other is not None:
        yield Verdict("int8, decode 1 beside a busy core: that share over llama.cpp's", ours / other, 1.0)


def neighbour_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Of every contestant, the rate beside a busy core over the idle one, medians of both."""
    own = [row for row in rows if row["row"] == "neighbour"]
    shares = {}
    for label in dict.fromkeys(row["contestant"] for row in own):
        seconds = [
            [r["seconds"] for r in own if r["contestant"] == label and r["is_loaded"] is flag] for flag in (False, True)
        ]
        if all(seconds):
            shares[label] = statistics.median(seconds[0]) / statistics.median(seconds[1])
    return shares


def _is(row: Row, kind: str, contest: str, contestant: str, measure: str) -> bool:
    found = (row["row"], row.get("contest"), row.get("contestant"), row.get("measure"))
    return found == (kind, contest, contestant, measure)
