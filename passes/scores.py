"""What is added to scores before the mask, as a small hashable value: the companion of `passes/masks.py`.

A score function gets scores that are scaled and soft-capped already, and the head and positions of each. It is
elementwise in the scores, and reads run-time arrays through `Read` as masks do.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from passes.attention.expression import Expression, evaluate
from passes.masks import Look, Read


class Score(abc.ABC):
    """A function of one score, its head and its positions. Invariant: immutable and hashable."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """The run-time values the function needs, each once."""
        return ()

    @abc.abstractmethod
    def evaluate(self, scores: Any, head: Any, q: Any, k: Any, look: Look) -> Any:
        """New scores; `head`, `q`, `k` and what `look` answers broadcast against them."""

    def apply(self, scores: Any, head: Any, q: Any, k: Any, leaves: Sequence[Any] = ()) -> Any:
        """New scores, reads answered by one request's leaves."""
        return self.evaluate(scores, head, q, k, lambda read: read.of(leaves[read.leaf], q, k, head))


@dataclass(frozen=True)
class Alibi(Score):
    """Minus a slope for each head times the distance (arXiv:2108.12409): `s - leaf[n] * |q + shift - k|`.

    Attributes:
      shift: What is added to query positions; `S - T` counts queries from the end of the keys.
    """

    leaf: int
    shift: int = 0

    @property
    def reads(self) -> tuple[Read, ...]:
        return (Read(self.leaf, "head"),)

    def evaluate(self, scores: Any, head: Any, q: Any, k: Any, look: Look) -> Any:
        slope = look(self.reads[0]).astype(scores.dtype)
        return scores - slope * abs(q + self.shift - k).astype(scores.dtype)


@dataclass(frozen=True)
class Biased(Score):
    """Plus an expression of head and positions, whose leaf i is what `held[i]` reads: any bias that can be lifted.

    Positions are indices: of queries in the step, of keys from 0.
    """

    expression: Expression
    held: tuple[Read, ...]

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(dict.fromkeys(self.held))

    def evaluate(self, scores: Any, head: Any, q: Any, k: Any, look: Look) -> Any:
        bias = evaluate(self.expression, None, {"n": head, "t": q, "s": k}, [look(read) for read in self.held])
        return scores + bias.astype(scores.dtype)
