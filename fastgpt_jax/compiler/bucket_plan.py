"""Which shapes of step to compile: chunk lengths of prefill and rows of decode, and how much of them will be padding.

Knows no model. The one idea: what is expected to be served (measured, or assumed log-uniform) gives every choice of
buckets an expected number of computed rows, and dynamic programming finds the choice with the fewest. The longest
bucket is settled first: without it the shortest chunks would always pad least, and read the weights once for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.errors import UserError

DEFAULT_CHUNK_LENS = (16, 64, 256, 1024)
MAX_CHUNK_LEN = DEFAULT_CHUNK_LENS[-1]
"""Longest chunk that is chosen: a step of this many tokens is bound by arithmetic, so longer ones gain nothing."""
CHUNK_GRAIN = 8
"""Chunk lengths chosen for traffic are multiples of this."""
MAX_BUCKETS = 8
MIN_GAIN = 0.05
"""A bucket more must save at least this share of the rows that are not padding, since it costs compilations."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What is expected to be served. Weights are counts or shares, not negative; an empty mapping is not known.

    Attributes:
      prompt_tokens: Length of a prompt in tokens -> weight.
      concurrency: Requests that decode together -> weight, a weight a step.
    """

    prompt_tokens: Mapping[int, float] = dataclasses.field(default_factory=dict)
    concurrency: Mapping[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """The shapes chosen, and what to expect of them.

    Attributes:
      prefill_waste: Share of computed prompt rows that will be padding, where every prompt is prefilled alone.
      decode_waste: Share of computed decode rows that will be padding.
      prefill_basis: What `prefill_waste` was reckoned for, in words.
      decode_basis: The same for `decode_waste`.
    """

    buckets: Buckets
    prefill_waste: float
    decode_waste: float
    prefill_basis: str
    decode_basis: str

    @property
    def num_entry_points(self) -> int:
        """Entry points that will be compiled."""
        return sum(1 for _ in self.buckets.keys())


def plan_buckets(
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    min_first_chunk: int,
    *,
    chunk_lens: Sequence[int] | None = None,
    decode_rows: Sequence[int] | None = None,
    traffic: Traffic | None = None,
) -> BucketPlan:
    """Chooses the shapes of steps.

    A chunk length that is not given comes from the traffic's prompts, or is of 16, 64, 256 and 1024; rows of decode
    come from the traffic's concurrency, or double from 1. There is always a chunk length of at least `min_first_chunk`,
    and a decode step of `max_num_seqs` rows.

    Args:
      max_num_batched_tokens: Tokens, padding included, of a prefill step that holds several requests.
      min_first_chunk: Prompt tokens that the first chunk of a request must hold; above 1 for a prefix-LM.
      chunk_lens: Chunk lengths of prefill to have, in place of those chosen.
      decode_rows: Rows of decode to have, in place of those chosen.

    Raises:
      UserError: A shape is given that cannot be run, or no prompt of the traffic can be served.
    """
    traffic = traffic if traffic is not None else Traffic()
    prompts = _servable(traffic.prompt_tokens, max_model_len)
    concurrency = _clipped(traffic.concurrency, max_num_seqs)
    lens = _choose_chunk_lens(max_model_len, min_first_chunk, chunk_lens, prompts)
    rows = _choose_decode_rows(max_num_seqs, decode_rows, concurrency)
    if 1 in lens:  # a prefill of one token a request is a decode step
        rows = [1, *rows]
    rows = sorted({*rows, max_num_seqs})
    prefill = [
        (length, count)
        for length in lens
        for count in sorted({1, max(1, min(max_num_seqs, max_num_batched_tokens // length))})
        if length > 1 or count in rows
    ]
    return BucketPlan(
        Buckets(tuple(prefill), tuple(rows)),
        _waste(prompts or _log_uniform(max_model_len), lens),
        _waste(concurrency or _log_uniform(max_num_seqs), rows),
        "the prompts of the traffic" if prompts else f"prompts log-uniform from 1 to {max_model_len} tokens",
        "the concurrency of the traffic" if concurrency else f"concurrency log-uniform from 1 to {max_num_seqs}",
    )


def computed_rows(num_rows: int, buckets: Sequence[int]) -> int:
    """Rows that are computed for so many: whole largest buckets, then the smallest that holds the rest.

    Args:
      buckets: Sizes, ascending.
    """
    num_whole = max(0, -(-num_rows // buckets[-1]) - 1)
    rest = num_rows - num_whole * buckets[-1]
    return num_whole * buckets[-1] + next(size for size in buckets if size >= rest)


def fit_buckets(
    weights: Mapping[int, float],
    candidates: Sequence[int],
    *,
    max_buckets: int = MAX_BUCKETS,
    min_gain: float = MIN_GAIN,
) -> list[int]:
    """The sizes, ascending, that compute the fewest rows for the weighted numbers of rows.

    Args:
      weights: Number of rows, at most the last candidate -> weight.
      candidates: Sizes to choose from, ascending; the last is always chosen.
      min_gain: A size more must save this share of the weighted rows. None saves more than the one before it, so
        the first that saves too little ends the search.
    """
    sizes = np.asarray(candidates)
    total = np.zeros(sizes[-1] + 1)
    for number, weight in weights.items():
        total[number] += weight
    below = np.concatenate([[0.0], np.cumsum(total)[sizes]])  # weight of what the sizes before index i hold
    # cost[i, j]: rows computed for what size j holds and sizes before index i do not.
    cost = np.where(
        np.arange(len(sizes))[:, None] <= np.arange(len(sizes))[None],
        sizes * (below[None, 1:] - below[:-1, None]),
        np.inf,
    )
    least = cost[0]  # rows computed with one size, for all that size j holds
    came_from = []
    while len(came_from) + 1 < min(max_buckets, len(sizes)):
        through = np.vstack([np.full(len(sizes), np.inf), least[:-1, None] + cost[1:]])
        best = through.argmin(axis=0)
        more = through.min(axis=0)
        if least[-1] - more[-1] < min_gain * float(np.dot(total, np.arange(len(total)))):
            break
        least = more
        came_from.append(best - 1)
    chosen = [len(sizes) - 1]
    for previous in reversed(came_from):
        chosen.append(int(previous[chosen[-1]]))
    return [int(sizes[index]) for index in reversed(chosen)]


def _choose_chunk_lens(
    max_model_len: int, min_first_chunk: int, given: Sequence[int] | None, prompts: Mapping[int, float]
) -> list[int]:
    """The chunk lengths of prefill, ascending."""
    longest = min(max_model_len, max(min_first_chunk, MAX_CHUNK_LEN))
    if given:
        return _with_last(_checked("prefill bucket", given, max_model_len, "max_model_len"), min_first_chunk)
    if prompts:
        return _fit_chunk_lens(prompts, longest, min_first_chunk)
    return _with_last([n for n in DEFAULT_CHUNK_LENS if n <= longest] or [longest], min_first_chunk)


def _choose_decode_rows(max_num_seqs: int, given: Sequence[int] | None, concurrency: Mapping[int, float]) -> list[int]:
    """Rows of decode, without those of all requests where they are not named."""
    if given:
        return _checked("decode bucket", given, max_num_seqs, "max_num_seqs")
    if concurrency:
        return fit_buckets(concurrency, range(1, max_num_seqs + 1))
    return [2**i for i in range((max_num_seqs - 1).bit_length())]


def _fit_chunk_lens(prompts: Mapping[int, float], longest: int, min_first_chunk: int) -> list[int]:
    """Chunk lengths for prompts; the last holds the longest of them where it may, and every first chunk."""
    wanted = max(min_first_chunk, -(-max(prompts) // CHUNK_GRAIN) * CHUNK_GRAIN)
    last = min(longest, wanted)
    rests: dict[int, float] = {}
    for length, weight in prompts.items():
        rest = (length - 1) % last + 1
        rests[rest] = rests.get(rest, 0.0) + weight
    # A gain is a share of all prompt tokens, whole chunks included.
    num_tokens, num_in_rests = (sum(n * weight for n, weight in w.items()) for w in (prompts, rests))
    candidates = [*range(CHUNK_GRAIN, last, CHUNK_GRAIN), last]
    return fit_buckets(rests, candidates, min_gain=MIN_GAIN * num_tokens / num_in_rests)


def _checked(what: str, sizes: Sequence[int], most: int, limit: str) -> list[int]:
    """The given sizes in order; a UserError where one of them cannot be run."""
    for size in sizes:
        if not 1 <= size <= most:
            raise UserError(f"a {what} must be from 1 to {limit}={most}, got {size}")
    return sorted(set(sizes))


def _with_last(lens: list[int], least: int) -> list[int]:
    """The chunk lengths, with one more where the last is too short for a first chunk."""
    return lens if lens[-1] >= least else [*lens, least]


def _servable(prompts: Mapping[int, float], max_model_len: int) -> dict[int, float]:
    """The prompts that fit with a token of answer; longer ones are refused by the engine and are no traffic."""
    found = {length: weight for length, weight in prompts.items() if length < max_model_len and weight > 0}
    if not found and any(weight > 0 for weight in prompts.values()):
        raise UserError(
            f"every prompt of the traffic has {max_model_len} tokens or more, which max_model_len={max_model_len} does "
            "not hold together with an answer; raise it, or take another histogram"
        )
    return found


def _clipped(concurrency: Mapping[int, float], max_num_seqs: int) -> dict[int, float]:
    """The concurrency with more requests than run together counted as that many."""
    found: dict[int, float] = {}
    for number, weight in concurrency.items():
        if weight > 0:
            number = min(number, max_num_seqs)
            found[number] = found.get(number, 0.0) + weight
    return found


def _log_uniform(most: int) -> dict[int, float]:
    return {number: 1 / number for number in range(1, most + 1)}


def _waste(weights: Mapping[int, float], buckets: Sequence[int]) -> float:
    """The share of computed rows that are padding."""
    real = sum(weight * number for number, weight in weights.items())
    computed = sum(weight * computed_rows(number, buckets) for number, weight in weights.items())
    return 1 - real / computed
