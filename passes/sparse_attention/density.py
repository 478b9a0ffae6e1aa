"""How much of an attention a mask leaves: pairs of query and key, and blocks that a kernel would visit.

Both are parts of what another mask holds: of the causal one, say. Run-time leaves are taken to hide nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from passes.block_lists import block_list
from passes.masks import And, Mask, Nothing, Or, all_of, any_of, causal

MAX_QUERIES = 1024
"""Queries whose keys are counted; of longer sequences as many, evenly spaced."""
BLOCK = 128


@dataclass(frozen=True)
class Density:
    """Shares between 0 and 1.

    Attributes:
      elements: Of the pairs.
      blocks: Of the blocks of `BLOCK` by `BLOCK` that are not empty.
    """

    elements: float
    blocks: float

    def __str__(self) -> str:
        return f"{self.elements:.1%} of the pairs and {self.blocks:.1%} of the blocks of {BLOCK} by {BLOCK}"


@functools.cache
def find_density(mask: Mask, base: Mask, length: int) -> Density:
    """What `mask` leaves of `base` over `length` positions."""
    blocks = block_list(mask, length, length, BLOCK, BLOCK)
    return Density(
        float(num_keys(mask, length).sum() / num_keys(base, length).sum()),
        blocks.share_of(block_list(base, length, length, BLOCK, BLOCK)),
    )


@functools.cache
def num_keys(mask: Mask, length: int) -> np.ndarray:
    """How many of `length` keys each query sees, for at most `MAX_QUERIES` of them, the first and the last included."""
    queries = np.unique(np.linspace(0, length - 1, min(length, MAX_QUERIES)).round().astype(np.int32))
    keys, static = np.arange(length, dtype=np.int32), without_leaves(mask)
    counts = [np.broadcast_to(static.contains(q, keys), length).sum() for q in queries]
    return np.array(counts, np.int64)


def blind_query(mask: Mask, length: int) -> int | None:
    """A query that sees no key at all, causal or not, or None."""
    counts = num_keys(mask & causal(), length)
    return None if counts.all() else int(np.linspace(0, length - 1, len(counts)).round()[np.argmin(counts)])


def without_leaves(mask: Mask) -> Mask:
    """The mask with every rule that reads a run-time array taken to hold everywhere."""
    if isinstance(mask, And):
        return all_of(map(without_leaves, mask.terms))
    if isinstance(mask, Or):
        return any_of(map(without_leaves, mask.terms))
    return ~Nothing() if mask.reads else mask
