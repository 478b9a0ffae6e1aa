"""Which key a query sees, as a small hashable value: the mask algebra.

A mask answers two questions. `contains(q, k, leaves)`: does the query at position q see the key at position k?
`block(q0, q1, k0, k1)`: is any pair of these ranges visible (possible), are all (certain)? Masks combine with `&`, `|`
and `~`; on blocks these are the connectives of three-valued logic, so an answer may be too cautious (possible where
nothing is visible, not certain where everything is) and is never wrong.

The one idea: a rule that is known by its shape, and not as an array, can be asked about a block without looking inside.
Run-time arrays (segment ids, lengths) are *leaves*, named by number and read through `Read`, so that a kernel may
answer a read from what it holds in registers. Knows no kernel and no graph. `passes/block_lists.py` makes block lists.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Answer = tuple[Any, Any]
"""(possible, certain): booleans, or arrays of them where the ranges are arrays."""

_NODES_A_WORD = 32


@dataclass(frozen=True)
class Read:
    """How an element of a leaf is found.

    Attributes:
      leaf: Which leaf.
      by: `query` is `leaf[q]`, `key` is `leaf[k]`, `head` is `leaf[n]`, `request` is a leaf of one number for the whole
        request, `block` is `leaf[q // block[0], k // block[1]]`, `head_key` is `leaf[n, k]`, `head_pair` is
        `leaf[q, n, k]`.
      word: Index into the last axis, for a leaf that has one more.
    """

    leaf: int
    by: Literal["query", "key", "head", "request", "block", "head_key", "head_pair"]
    block: tuple[int, int] = (1, 1)
    word: int | None = None

    def of(self, leaf: Any, q: Any, k: Any, head: Any = None) -> Any:
        """Reads one request's leaf, without its batch axis."""
        if self.word is not None:
            leaf = leaf[..., self.word]
        if self.by == "block":
            return leaf[q // self.block[0], k // self.block[1]]
        if self.by == "head_key":
            return leaf[head, k]
        if self.by == "head_pair":
            return leaf[q, head, k]
        index = {"query": q, "key": k, "head": head}
        return leaf[index[self.by]] if self.by in index else leaf


Look = Callable[[Read], Any]
"""Answers a read: an array that broadcasts against the positions; for a block, one number, or None if it has none."""


class Mask(abc.ABC):
    """A rule of visibility. Invariant: immutable and hashable; equal masks hold the same pairs."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """The run-time values the rule needs, each once."""
        return ()

    @property
    def reads_query(self) -> bool:
        """Whether the answer may differ between queries."""
        return True

    @abc.abstractmethod
    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        """Whether q sees k, for positions of equal shape; `look` answers reads at these positions."""

    @abc.abstractmethod
    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        """Whether any pair, and whether every pair, of queries `[q0, q1)` and keys `[k0, k1)` is visible.

        Args:
          q0: Whole numbers or arrays of them; no range is empty.
          look: Answers reads that have one value for all of the block, and None to others; without it nothing is known
            of leaves.
        """

    def contains(self, q: Any, k: Any, leaves: Sequence[Any] = ()) -> Any:
        """Whether q sees k, for NumPy or JAX arrays of positions that broadcast, and one request's leaves."""
        q, k = q + 0 * k, k + 0 * q
        return self.evaluate(q, k, lambda read: read.of(leaves[read.leaf], q, k))

    def __and__(self, other: Mask) -> Mask:
        return all_of((self, other))

    def __or__(self, other: Mask) -> Mask:
        return any_of((self, other))

    def __invert__(self) -> Mask:
        return Not(self)


@dataclass(frozen=True)
class All(Mask):
    """Everything is visible."""

    @property
    def reads_query(self) -> bool:
        return False

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return k == k

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        return True, True

    def __invert__(self) -> Mask:
        return Nothing()


@dataclass(frozen=True)
class Nothing(Mask):
    """Nothing is visible."""

    @property
    def reads_query(self) -> bool:
        return False

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return k != k

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        return False, False

    def __invert__(self) -> Mask:
        return All()


# --------------------------------------------------------------------------------------- intervals
@dataclass(frozen=True)
class _Interval(Mask):
    """A number made of q and k lies in `[lo, end)`; None is no bound."""

    lo: int | None = None
    hi: int | None = None

    @property
    def end(self) -> int | None:
        """The first number past the interval."""
        return self.hi

    @classmethod
    def of(cls, lo: int | None, end: int | None) -> Mask:
        """The interval from `lo` to before `end`, as the simplest mask."""
        if lo is None and end is None:
            return All()
        return Nothing() if lo is not None and end is not None and lo >= end else cls(lo, end)

    @abc.abstractmethod
    def _number(self, q: Any, k: Any) -> Any:
        """The number."""

    @abc.abstractmethod
    def _extremes(self, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
        """The smallest and the largest number in a block."""

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        number = self._number(q, k)
        above = number == number if self.lo is None else number >= self.lo
        return above if self.end is None else above & (number < self.end)

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        least, most = self._extremes(q0, q1, k0, k1)
        possible, certain = True, True
        if self.lo is not None:
            possible, certain = possible & (most >= self.lo), certain & (least >= self.lo)
        if self.end is not None:
            possible, certain = possible & (least < self.end), certain & (most < self.end)
        return possible, certain

    def __invert__(self) -> Mask:
        below = Nothing() if self.lo is None else self.of(None, self.lo)
        return below | (Nothing() if self.end is None else self.of(self.end, None))


@dataclass(frozen=True)
class Offset(_Interval):
    """`lo <= q - k <= hi`: `Offset(0, None)` is causal, `Offset(0, W - 1)` a causal window of W keys."""

    @property
    def end(self) -> int | None:
        return None if self.hi is None else self.hi + 1

    @classmethod
    def of(cls, lo: int | None, end: int | None) -> Mask:
        made = super().of(lo, end)
        return cls(lo, end - 1) if isinstance(made, Offset) and end is not None else made

    def _number(self, q: Any, k: Any) -> Any:
        return q - k

    def _extremes(self, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
        return q0 - (k1 - 1), (q1 - 1) - k0


@dataclass(frozen=True)
class KeyRange(_Interval):
    """`lo <= k < hi`: attention sinks, a prefix that every query sees."""

    @property
    def reads_query(self) -> bool:
        return False

    def _number(self, q: Any, k: Any) -> Any:
        return k

    def _extremes(self, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
        return k0, k1 - 1


@dataclass(frozen=True)
class QueryRange(_Interval):
    """`lo <= q < hi`: a rule for some of the queries."""

    def _number(self, q: Any, k: Any) -> Any:
        return q

    def _extremes(self, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
        return q0, q1 - 1


# --------------------------------------------------------------------------------------- run-time rules
@dataclass(frozen=True)
class Segment(Mask):
    """Query and key bear the same number: `q_leaf[q] == k_leaf[k]`; sequences packed into one row."""

    q_leaf: int
    k_leaf: int

    @property
    def reads(self) -> tuple[Read, ...]:
        return Read(self.q_leaf, "query"), Read(self.k_leaf, "key")

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        of_query, of_key = self.reads
        return look(of_query) == look(of_key)

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        return True, False


@dataclass(frozen=True)
class KeyLength(Mask):
    """`k < leaf`, a number for each request: padding at the end."""

    leaf: int

    @property
    def reads_query(self) -> bool:
        return False

    @property
    def reads(self) -> tuple[Read, ...]:
        return (Read(self.leaf, "request"),)

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return k < look(self.reads[0])

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        length = look(self.reads[0]) if look is not None else None
        return (True, False) if length is None else (k0 < length, k1 <= length)


@dataclass(frozen=True)
class KeyFlag(Mask):
    """`leaf[k] != 0`: padding anywhere."""

    leaf: int

    @property
    def reads_query(self) -> bool:
        return False

    @property
    def reads(self) -> tuple[Read, ...]:
        return (Read(self.leaf, "key"),)

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return look(self.reads[0]).astype(bool)

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        return True, False


@dataclass(frozen=True)
class BlockTable(Mask):
    """`leaf[q // block_q, k // block_k] != 0`: blocks chosen at run time."""

    leaf: int
    block_q: int
    block_k: int

    @property
    def reads(self) -> tuple[Read, ...]:
        return (Read(self.leaf, "block", (self.block_q, self.block_k)),)

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return look(self.reads[0]).astype(bool) & (k == k)

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        chosen = look(self.reads[0]) if look is not None else None
        return (True, False) if chosen is None else (chosen.astype(bool), chosen.astype(bool))


@dataclass(frozen=True)
class Tree(Mask):
    """Drafted tokens that are verified together see their ancestors.

    Node j of the draft lies at key position `start + j`, `start` a number for each request. Query q sees node j where
    bit `j % 32` of word `j // 32` of `leaf[q]` is set (int32 `[T, num_words]`); keys that are no node are not visible,
    so verification is `KeyLength(start_leaf) | Tree(leaf, start_leaf, num_words)`.
    """

    leaf: int
    start_leaf: int
    num_words: int = 1

    @property
    def reads(self) -> tuple[Read, ...]:
        words = tuple(Read(self.leaf, "query", word=word) for word in range(self.num_words))
        return (Read(self.start_leaf, "request"), *words)

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        start, *words = self.reads
        node = k - look(start)
        seen = k != k
        for number, word in enumerate(words):
            bit = node - _NODES_A_WORD * number
            inside = (bit >= 0) & (bit < _NODES_A_WORD)
            # The remainder keeps shifts in range where the node lies in another word.
            seen = seen | (inside & (((look(word) >> (bit & (_NODES_A_WORD - 1))) & 1) == 1))
        return seen

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        start = look(self.reads[0]) if look is not None else None
        if start is None:
            return True, False
        return (k1 > start) & (k0 < start + _NODES_A_WORD * self.num_words), False


@dataclass(frozen=True)
class Shifted(Mask):
    """A mask of positions that a step's queries do not begin at 0 of: query i stands at position `leaf + i`.

    `leaf` is a number for each request, at least 0. Leaves that the mask reads by query are read at i all the same.
    """

    mask: Mask
    leaf: int

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(dict.fromkeys((Read(self.leaf, "request"), *self.mask.reads)))

    @property
    def reads_query(self) -> bool:
        return self.mask.reads_query

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return self.mask.evaluate(q + look(Read(self.leaf, "request")), k, look)

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        start = look(Read(self.leaf, "request")) if look is not None else None
        return (True, False) if start is None else self.mask.block(q0 + start, q1 + start, k0, k1, look)


# --------------------------------------------------------------------------------------- connectives
@dataclass(frozen=True)
class Not(Mask):
    """The pairs that an atom does not hold."""

    mask: Mask

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.mask.reads

    @property
    def reads_query(self) -> bool:
        return self.mask.reads_query

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return self.mask.evaluate(q, k, look) ^ True

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        possible, certain = self.mask.block(q0, q1, k0, k1, look)
        return certain ^ True, possible ^ True

    def __invert__(self) -> Mask:
        return self.mask


@dataclass(frozen=True)
class _Connective(Mask):
    """Two masks or more. Made by `all_of` and `any_of`, which keep terms sorted and no term superfluous."""

    terms: tuple[Mask, ...]

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(dict.fromkeys(read for term in self.terms for read in term.reads))

    @property
    def reads_query(self) -> bool:
        return any(term.reads_query for term in self.terms)


@dataclass(frozen=True)
class And(_Connective):
    """The pairs that every term holds."""

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        held = self.terms[0].evaluate(q, k, look)
        for term in self.terms[1:]:
            held = held & term.evaluate(q, k, look)
        return held

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        possible, certain = True, True
        for term in self.terms:
            p, c = term.block(q0, q1, k0, k1, look)
            possible, certain = possible & p, certain & c
        return possible, certain

    def __invert__(self) -> Mask:
        return any_of(~term for term in self.terms)


@dataclass(frozen=True)
class Or(_Connective):
    """The pairs that some term holds."""

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        held = self.terms[0].evaluate(q, k, look)
        for term in self.terms[1:]:
            held = held | term.evaluate(q, k, look)
        return held

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        possible, certain = False, False
        for term in self.terms:
            p, c = term.block(q0, q1, k0, k1, look)
            possible, certain = possible | p, certain | c
        return possible, certain

    def __invert__(self) -> Mask:
        return all_of(~term for term in self.terms)


def all_of(masks: Iterable[Mask]) -> Mask:
    """The pairs that every one of some masks holds, simplified."""
    terms = _intersected(_flat(masks, And))
    return _combined(terms, And, Or, neutral=All(), absorbing=Nothing())


def any_of(masks: Iterable[Mask]) -> Mask:
    """The pairs that some of the masks hold, simplified."""
    terms = _united(_flat(masks, Or))
    return _combined(terms, Or, And, neutral=Nothing(), absorbing=All())


def _flat(masks: Iterable[Mask], kind: type[_Connective]) -> list[Mask]:
    return [term for mask in masks for term in (mask.terms if isinstance(mask, kind) else (mask,))]


def _combined(
    terms: Iterable[Mask], kind: type[_Connective], dual: type[_Connective], *, neutral: Mask, absorbing: Mask
) -> Mask:
    kept = {term for term in terms if term != neutral}
    # a & (a | b) is a, and a | (a & b) is a.
    kept = {t for t in kept if not (isinstance(t, dual) and any(inner in kept for inner in t.terms))}
    if absorbing in kept or any(isinstance(t, Not) and t.mask in kept for t in kept):
        return absorbing
    if len(kept) < 2:
        return next(iter(kept), neutral)
    return kind(tuple(sorted(kept, key=repr)))


def _intersected(terms: list[Mask]) -> list[Mask]:
    """Intervals of one kind become their common part."""
    rest = [t for t in terms if not isinstance(t, _Interval)]
    for kind in (Offset, KeyRange, QueryRange):
        same = [t for t in terms if isinstance(t, kind)]
        los, ends = [t.lo for t in same if t.lo is not None], [t.end for t in same if t.end is not None]
        rest.append(kind.of(max(los, default=None), min(ends, default=None)))
    return rest


def _united(terms: list[Mask]) -> list[Mask]:
    """Intervals of one kind that touch become one."""
    rest = [t for t in terms if not isinstance(t, _Interval)]
    for kind in (Offset, KeyRange, QueryRange):
        same = [t for t in terms if isinstance(t, kind) and kind.of(t.lo, t.end) != Nothing()]
        joined: list[tuple[int | None, int | None]] = []
        for t in sorted(same, key=lambda t: (t.lo is not None, t.lo or 0)):
            lo, end = t.lo, t.end
            if joined and (joined[-1][1] is None or lo is None or lo <= joined[-1][1]):
                last_lo, last_end = joined.pop()
                lo, end = last_lo, None if last_end is None or end is None else max(last_end, end)
            joined.append((lo, end))
        rest.extend(kind.of(lo, end) for lo, end in joined)
    return rest


def key_rule(mask: Mask) -> Mask:
    """What a mask says of keys alone: a key that fails it is seen by no query at all."""
    terms = mask.terms if isinstance(mask, And) else (mask,)
    return all_of(term for term in terms if not term.reads_query)


def causal() -> Mask:
    """Every query sees itself and what came before."""
    return Offset(0, None)


def window(size: int) -> Mask:
    """Every query sees the last `size` keys up to itself."""
    if size < 1:
        raise ValueError(f"a window holds at least 1 key, got {size}")
    return Offset(0, size - 1)


# --------------------------------------------------------------------------------------- beside masks
_T = TypeVar("_T")


@dataclass(frozen=True)
class PerHead:
    """One mask for each query head."""

    masks: tuple[Mask, ...]

    @property
    def heads(self) -> dict[Mask, tuple[int, ...]]:
        """The heads of each distinct mask, masks in the order of their first heads."""
        return _grouped(self.masks)


@dataclass(frozen=True)
class PerLayer:
    """One mask, or one mask for each head, for each layer."""

    masks: tuple[Mask | PerHead, ...]

    @property
    def layers(self) -> dict[Mask | PerHead, tuple[int, ...]]:
        """The layers of each distinct mask, masks in the order of their first layers."""
        return _grouped(self.masks)


def _grouped(masks: Sequence[_T]) -> dict[_T, tuple[int, ...]]:
    return {mask: tuple(i for i, other in enumerate(masks) if other == mask) for mask in dict.fromkeys(masks)}
