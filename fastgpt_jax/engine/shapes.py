"""Which entry point to run, and which tokens of which requests go into its rows.

Knows no pages. The one idea: a step costs a fixed part and its tokens, padding included, so the best step is the one
with the most tokens for somebody at that cost, with what the first prompt will cost afterwards counted in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.engine.request import Request

STEP_COST_TOKENS = 64
"""What a step costs besides its tokens, in tokens: weights are read once a step, and the host prepares it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Consecutive tokens of a request in one row of a step."""

    request: Request
    start: int
    num_new: int

    @property
    def stop(self) -> int:
        return self.start + self.num_new


@dataclasses.dataclass(frozen=True)
class Item:
    """What a request could have computed.

    Attributes:
      start: Its first row that is not there.
      num_left: Rows until its next token.
      page_end: Where a chunk must end if it gets there; 0 for nowhere.
      is_scored: Whether log-probabilities of its prompt are wanted beside.
    """

    request: Request
    start: int
    num_left: int
    page_end: int = 0
    is_scored: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """An entry point: rows of `chunk_len` tokens; `may_score` where one exists that scores."""

    chunk_len: int
    num_rows: int
    may_score: bool

    @property
    def num_tokens(self) -> int:
        return self.chunk_len * self.num_rows


@dataclasses.dataclass(frozen=True)
class Filling:
    """A shape with its rows; the rest of the shape's rows stay idle.

    Attributes:
      decodes, prefills: Whether it has every decode, and the first prompt.
    """

    shape: Shape
    rows: tuple[Row, ...]
    decodes: bool
    prefills: bool

    @property
    def num_new(self) -> int:
        """Tokens computed for somebody."""
        return sum(row.num_new for row in self.rows)


class Shapes:
    """The entry points of a model, and the choice among them."""

    def __init__(
        self,
        buckets: Buckets,
        *,
        is_ragged: bool,
        min_first_chunk: int,
        max_tokens: int | None = None,
        is_pinned: bool = False,
    ):
        """Makes the choice of the entry points of a model.

        Args:
          max_tokens: Steps of more tokens are left out, but for those that nothing can do without.
          is_pinned: Leaves the longest chunk of one request, and the decode of the most, which are never mixed.
        """
        self._is_ragged = is_ragged
        self._min_first = min_first_chunk
        self._prefill = self._allowed([Shape(chunk, rows, True) for chunk, rows in buckets.prefill], max_tokens)
        self._decode = [Shape(1, rows, Shape(1, rows, True) in self._prefill) for rows in buckets.decode]
        if is_pinned:
            self._is_ragged = False
            self._prefill = [max((s for s in self._prefill if s.num_rows == 1), key=lambda shape: shape.chunk_len)]
            self._decode = self._decode[-1:]
        self._chunk_lens = sorted({shape.chunk_len for shape in self._prefill if shape.num_rows == 1})
        self._costs_of_rest = [0]  # by the number of tokens left, up to the most that was asked for

    def _allowed(self, shapes: list[Shape], max_tokens: int | None) -> list[Shape]:
        """The shapes within a limit, and the smallest that holds a first chunk."""
        need = min(s.num_tokens for s in shapes if s.chunk_len >= self._min_first and s.num_rows == 1)
        return [s for s in shapes if max_tokens is None or s.num_tokens <= max(max_tokens, need)]

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest step."""
        return max(shape.num_tokens for shape in (*self._prefill, *self._decode))

    def choose(
        self, decodes: Sequence[Item], prompts: Sequence[Item], *, needs_decodes: bool, needs_prompts: bool
    ) -> Filling | None:
        """Returns the best step.

        Args:
          decodes: Requests with one row left.
          prompts: Those with more, in the order in which they should be served.
          needs_decodes, needs_prompts: Whether it must have every decode, or the first prompt; a step has both where
            that is best, and the program can.
        """
        best, best_rate = None, 0.0
        for filling in self._fillings(decodes, prompts):
            if (needs_decodes and not filling.decodes) or (needs_prompts and not filling.prefills):
                continue
            rate = self._rate(filling, prompts)
            if rate > best_rate:
                best, best_rate = filling, rate
        return best

    def _fillings(self, decodes: Sequence[Item], prompts: Sequence[Item]) -> list[Filling]:
        fillings = []
        if decodes:
            shape = next(shape for shape in self._decode if shape.num_rows >= len(decodes))
            fillings.append(self._fill(shape, decodes, prompts if self._is_ragged else ()))
        if prompts:
            # A program without a decode step of one row, or without decodes, still has prompts of a token or two left.
            shapes = [*self._prefill, *(shape for shape in self._decode if self._is_ragged)]
            fillings += [self._fill(shape, (), prompts) for shape in shapes]
            if decodes and self._is_ragged:
                fillings += [self._fill(s, decodes, prompts) for s in self._prefill if s.num_rows > len(decodes)]
        return [filling for filling in fillings if filling.rows]

    def _fill(self, shape: Shape, decodes: Sequence[Item], prompts: Sequence[Item]) -> Filling:
        """Gives every decode a row, and the rest to prompts in their order."""
        rows = [Row(item.request, item.start, 1) for item in decodes]
        for item in prompts:
            if len(rows) == shape.num_rows:
                break
            if shape.may_score or not item.is_scored:
                rows += self._rows_of(item, shape, shape.num_rows - len(rows))
        has_first = bool(prompts) and any(row.request is prompts[0].request for row in rows)
        return Filling(shape, tuple(rows), decodes=bool(decodes), prefills=has_first)

    def _rows_of(self, item: Item, shape: Shape, num_rows: int) -> list[Row]:
        """Cuts a request's tokens into rows, one where the program takes no more."""
        rows: list[Row] = []
        start, stop = item.start, item.start + item.num_left
        if item.page_end > start and (start or item.page_end >= self._min_first):
            stop = min(stop, item.page_end)
        while start < stop and len(rows) < (num_rows if self._is_ragged else 1):
            num_new = min(stop - start, shape.chunk_len)
            if start == 0 and num_new < self._min_first:
                break
            rows.append(Row(item.request, start, num_new))
            start += num_new
        return rows

    def _rate(self, filling: Filling, prompts: Sequence[Item]) -> float:
        """Tokens for somebody at the cost of the step, and of what it leaves of the first prompt."""
        left = 0
        if filling.prefills:
            first = prompts[0]
            left = first.num_left - sum(row.num_new for row in filling.rows if row.request is first.request)
        cost = STEP_COST_TOKENS + filling.shape.num_tokens + self._cost_of_rest(left)
        return (filling.num_new + left) / cost

    def _cost_of_rest(self, num_left: int) -> int:
        """The least that so many more tokens of one request cost, one row a step."""
        longest, costs = self._chunk_lens[-1], self._costs_of_rest
        num_whole = max(num_left - 1, 0) // longest
        rest = max(num_left, 0) - num_whole * longest
        for total in range(len(costs), rest + 1):
            lens = [n for n in self._chunk_lens if n > 1 or n >= total]
            costs.append(min(STEP_COST_TOKENS + n + costs[max(total - n, 0)] for n in lens))
        return num_whole * (STEP_COST_TOKENS + longest) + costs[rest]
