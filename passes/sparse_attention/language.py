"""What `--sparse` says: which layers and heads see which keys, as frozen values.

    layers[0:4]: window(512) | sinks(8); layers[4:8]: density(0.3); heads[0:half]: window(512)

Clauses are separated by `;`. Each is a selection (`all`, `layers[a:b]`, `heads[a:b]`, or layers and heads joined by a
space or a comma) and a rule. Bounds are Python's, `half` stands for half of the number, and one number selects one. A
rule is made of `window(n)` (the last n keys up to the query itself), `sinks(n)` (the first n keys), `density(d)` (the
window that keeps the share d of what a causal mask holds at full length) and `full`, joined by `&` and `|`, `&` first,
with parentheses where need be. As with rules of quantization the first clause that selects a head decides about it; a
head that none selects stays as it is. A rule only ever takes keys away: the mask of the model holds too.

Knows masks and no graph. The one idea: what a clause means is asked of it when a model's layers and heads are known.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

from passes.masks import All, KeyRange, Mask, Offset


class SparsityError(ValueError):
    """A mistake in a text of clauses, or clauses that do not fit a model; the message is one line."""


def solve_density(density: float, length: int) -> int:
    """The window W = n (1 - sqrt(1 - d)) that holds the share d of the pairs of a causal mask over n positions."""
    return min(length, max(1, round(length * (1.0 - math.sqrt(1.0 - density)))))


def _last(size: int, length: int) -> Mask:
    return Offset(0, size - 1 if size < length else None)


# ------------------------------------------------------------------------------------------------- rules
class Rule(abc.ABC):
    """Which keys a query keeps. Invariant: immutable and hashable."""

    @abc.abstractmethod
    def mask(self, length: int) -> Mask:
        """The keys that are kept, over sequences of at most `length` tokens."""


@dataclass(frozen=True)
class Window(Rule):
    """The last `size` keys up to the query itself."""

    size: int

    def mask(self, length: int) -> Mask:
        return _last(self.size, length)

    def __str__(self) -> str:
        return f"window({self.size})"


@dataclass(frozen=True)
class Sinks(Rule):
    """The first `count` keys."""

    count: int

    def mask(self, length: int) -> Mask:
        return KeyRange(None, min(self.count, length))

    def __str__(self) -> str:
        return f"sinks({self.count})"


@dataclass(frozen=True)
class Density(Rule):
    """The window that keeps this share of a causal mask."""

    share: float

    def mask(self, length: int) -> Mask:
        return _last(solve_density(self.share, length), length)

    def __str__(self) -> str:
        return f"density({self.share:g})"


@dataclass(frozen=True)
class Full(Rule):
    """Every key: the heads stay as they are."""

    def mask(self, length: int) -> Mask:
        return All()

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Both(Rule):
    """The keys that both rules keep."""

    first: Rule
    second: Rule

    def mask(self, length: int) -> Mask:
        return self.first.mask(length) & self.second.mask(length)

    def __str__(self) -> str:
        return " & ".join(f"({x})" if isinstance(x, Either) else str(x) for x in (self.first, self.second))


@dataclass(frozen=True)
class Either(Rule):
    """The keys that one of two rules keeps."""

    first: Rule
    second: Rule

    def mask(self, length: int) -> Mask:
        return self.first.mask(length) | self.second.mask(length)

    def __str__(self) -> str:
        return f"{self.first} | {self.second}"


# ------------------------------------------------------------------------------------------------- selections
@dataclass(frozen=True)
class Bound:
    """A number, counted from the end where it is negative, or half of how many there are."""

    number: int = 0
    is_half: bool = False

    def of(self, total: int) -> int:
        """The place among `total`, which may lie outside."""
        if self.is_half:
            return total // 2
        return self.number + total if self.number < 0 else self.number

    def __str__(self) -> str:
        return "half" if self.is_half else str(self.number)


@dataclass(frozen=True)
class Span:
    """Numbers from `start` to before `stop`; None is no bound."""

    start: Bound | None = None
    stop: Bound | None = None
    is_one: bool = False

    def of(self, total: int, what: str) -> range:
        """The numbers selected among `total`.

        Raises:
          SparsityError: they lie outside, or there are none.
        """
        first = 0 if self.start is None else self.start.of(total)
        end = first + 1 if self.is_one else total if self.stop is None else self.stop.of(total)
        if not (0 <= first <= total and 0 <= end <= total):
            raise SparsityError(f"{what}{self} reaches outside of the {total} {what} of the model")
        if first >= end:
            raise SparsityError(f"{what}{self} selects none of the {total} {what} of the model")
        return range(first, end)

    def __str__(self) -> str:
        if self.is_one:
            return f"[{self.start}]"
        return f"[{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}]"


@dataclass(frozen=True)
class Clause:
    """A rule for the heads of some layers.

    Attributes:
      layers: None for all of them.
      heads: None for all of them.
      position: Where it begins in the text, from 1.
    """

    layers: Span | None
    heads: Span | None
    rule: Rule
    position: int = 1

    def __str__(self) -> str:
        spans = [f"{name}{span}" for name, span in (("layers", self.layers), ("heads", self.heads)) if span is not None]
        return f"{' '.join(spans) or 'all'}: {self.rule}"


@dataclass(frozen=True)
class Sparsity:
    """Clauses in order: the first that selects a head decides about it."""

    clauses: tuple[Clause, ...]

    @property
    def is_by_layer(self) -> bool:
        """Whether layers may differ."""
        return any(clause.layers is not None for clause in self.clauses)

    def choose(self, num_heads: Sequence[int]) -> Choice:
        """Which clause decides about each head of each layer.

        Args:
          num_heads: Query heads of each layer.

        Raises:
          SparsityError: A selection is empty or lies outside of the model.
        """
        chosen: list[list[int | None]] = [[None] * heads for heads in num_heads]
        for number, clause in enumerate(self.clauses):
            try:
                layers = (Span() if clause.layers is None else clause.layers).of(len(num_heads), "layers")
                for layer in layers:
                    for head in (Span() if clause.heads is None else clause.heads).of(num_heads[layer], "heads"):
                        if chosen[layer][head] is None:
                            chosen[layer][head] = number
            except SparsityError as error:
                raise SparsityError(f"at character {clause.position}: {error}") from error
        return Choice(self, tuple(map(tuple, chosen)))

    def __str__(self) -> str:
        return "; ".join(map(str, self.clauses))


@dataclass(frozen=True)
class Choice:
    """Clauses carried to a model.

    Attributes:
      clauses: For each layer and head the number of the clause that decides, or None.
    """

    sparsity: Sparsity
    clauses: tuple[tuple[int | None, ...], ...]

    def rules(self, layer: int) -> tuple[Rule, ...]:
        """The rule of each head of a layer."""
        return tuple(Full() if n is None else self.sparsity.clauses[n].rule for n in self.clauses[layer])

    @property
    def unused(self) -> tuple[Clause, ...]:
        """The clauses that decide about no head, since earlier ones do."""
        used = {n for layer in self.clauses for n in layer}
        return tuple(clause for n, clause in enumerate(self.sparsity.clauses) if n not in used)
