"""A mask as the program that the native kernels run: `native/mask.h` lists the operations.

Knows the mask algebra and no array. Rules come before what combines them; a mask of shifted positions stands between
two words that move the queries there and back.
"""

from __future__ import annotations

import functools
from typing import Any

from passes.masks import (
    All,
    And,
    BlockTable,
    KeyFlag,
    KeyLength,
    KeyRange,
    Mask,
    Not,
    Nothing,
    Offset,
    Or,
    QueryRange,
    Segment,
    Shifted,
    Tree,
)

_ALL, _NOTHING, _OFFSET, _KEY_RANGE, _QUERY_RANGE, _SEGMENT, _KEY_LENGTH, _KEY_FLAG = range(8)
_BLOCK_TABLE, _TREE, _SHIFT, _UNSHIFT, _AND, _OR, _NOT = range(8, 15)
_NO_BOUND = -(2**63)
_MAX_DEPTH = 32


class UnknownMask(Exception):
    """Why the kernels cannot be told of a mask."""


@functools.lru_cache(maxsize=256)
def mask_program(mask: Mask) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The program, and the leaves it reads: leaf i of the program is leaf `leaves[i]` of the mask.

    Raises:
      UnknownMask: There is no program.
    """
    leaves: dict[int, int] = {}
    words = _words(mask, leaves)
    if _depth(mask) > _MAX_DEPTH:
        raise UnknownMask(f"the mask combines more rules at once than {_MAX_DEPTH}")
    return tuple(words), tuple(leaves)


def _words(mask: Mask, leaves: dict[int, int]) -> list[int]:
    def leaf(number: int) -> int:
        return leaves.setdefault(number, len(leaves))

    match mask:
        case All():
            return [_ALL]
        case Nothing():
            return [_NOTHING]
        case Offset():
            return [_OFFSET, _bound(mask.lo), _bound(mask.hi)]
        case KeyRange():
            return [_KEY_RANGE, _bound(mask.lo), _bound(mask.hi)]
        case QueryRange():
            return [_QUERY_RANGE, _bound(mask.lo), _bound(mask.hi)]
        case Segment():
            return [_SEGMENT, leaf(mask.q_leaf), leaf(mask.k_leaf)]
        case KeyLength():
            return [_KEY_LENGTH, leaf(mask.leaf)]
        case KeyFlag():
            return [_KEY_FLAG, leaf(mask.leaf)]
        case BlockTable():
            return [_BLOCK_TABLE, leaf(mask.leaf), mask.block_q, mask.block_k]
        case Tree():
            return [_TREE, leaf(mask.leaf), leaf(mask.start_leaf), mask.num_words]
        case Shifted():
            return [_SHIFT, leaf(mask.leaf), *_words(mask.mask, leaves), _UNSHIFT, leaf(mask.leaf)]
        case Not():
            return [*_words(mask.mask, leaves), _NOT]
        case And() | Or():
            terms = [word for term in mask.terms for word in _words(term, leaves)]
            return [*terms, _AND if isinstance(mask, And) else _OR, len(mask.terms)]
    raise UnknownMask(f"it knows the rules of passes.masks only, got {type(mask).__name__}")


def _bound(bound: Any) -> int:
    return _NO_BOUND if bound is None else int(bound)


def _depth(mask: Mask) -> int:
    """How many answers wait at most while the program runs."""
    match mask:
        case Shifted() | Not():
            return _depth(mask.mask)
        case And() | Or():
            return max(i + _depth(term) for i, term in enumerate(mask.terms))
    return 1
