"""One rewrite as a value that can be checked by itself, and the counter that lets a bisection stop between two of them.

Knows no pattern and no driver: whoever rewrites says what it replaced by what.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from passes.graph import Graph, Source
from passes.numerics import Numerics


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A rewrite that was made: one closed graph in place of another.

    Invariant: both graphs have inputs and outputs of the same shapes and dtypes, in the same order, and share nothing
    mutable with the program they were taken from.

    Attributes:
      rule: What a message calls it.
      source: The user's line where it was made.
      budget: The largest relative error in the rewrite's own dtypes, for one that approximates or is native code.
    """

    rule: str
    numerics: Numerics
    before: Graph
    after: Graph
    source: Source = Source()
    budget: float | None = None

    def __str__(self) -> str:
        return f"{self.rule} at {self.source.short}" if self.source.frames else self.rule


@dataclass
class RewriteCounter:
    """Says of each rewrite, in order, whether it may be made; past `limit` none may.

    One counter serves a whole run of a pipeline. A pass that does not ask it counts as one rewrite.

    Attributes:
      limit: How many may be made; None for all.
      made: Names of those that were allowed, in order: the last is the one that a bisection looks for.
    """

    limit: int | None = None
    made: list[str] = field(default_factory=list)

    def allows(self, rule: str, source: Source = Source()) -> bool:
        """Counts a rewrite that is about to be made; False means that it must not be."""
        if self.is_exhausted:
            return False
        self.made.append(f"{rule} at {source.short}" if source.frames else rule)
        return True

    @property
    def is_exhausted(self) -> bool:
        """Whether no further rewrite may be made."""
        return self.limit is not None and len(self.made) >= self.limit
