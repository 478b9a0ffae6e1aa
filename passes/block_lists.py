"""Block lists: which blocks of a mask hold anything, and which of these hold everything.

The one idea: a kernel that walks such a list does no work for empty blocks, runs full ones without a mask, and
evaluates the rule in the partial ones only. Compressed rows: query block -> its key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.masks import KeyRange, Mask


@dataclass(frozen=True, eq=False)
class BlockList:
    """The blocks that a kernel visits.

    Invariants: `row_starts` has one entry more than there are query blocks and never falls; the key blocks of a query
    block are `key_blocks[row_starts[i] : row_starts[i + 1]]`, ascending; a pair that the mask holds lies in a listed
    block; a full block lies inside `num_q` and `num_k` and holds all its pairs.

    Attributes:
      rule: What partial blocks evaluate: the mask, and that keys past the end do not exist.
    """

    rule: Mask
    num_q: int
    num_k: int
    block_q: int
    block_k: int
    row_starts: np.ndarray
    key_blocks: np.ndarray
    is_full: np.ndarray

    @property
    def num_query_blocks(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_key_blocks(self) -> int:
        return -(-self.num_k // self.block_k)

    @property
    def query_blocks(self) -> np.ndarray:
        """The query block of each entry of `key_blocks`."""
        return np.repeat(np.arange(self.num_query_blocks, dtype=np.int32), np.diff(self.row_starts))

    @property
    def num_visited(self) -> int:
        return len(self.key_blocks)

    @property
    def num_full(self) -> int:
        return int(self.is_full.sum())

    @property
    def num_partial(self) -> int:
        return self.num_visited - self.num_full

    @property
    def density(self) -> float:
        """The share of all blocks that is visited."""
        return self.num_visited / max(1, self.num_query_blocks * self.num_key_blocks)

    def share_of(self, other: BlockList) -> float:
        """Blocks visited, in parts of those of another list: of the causal mask, say."""
        return self.num_visited / other.num_visited


def block_list(mask: Mask, num_q: int, num_k: int, block_q: int, block_k: int) -> BlockList:
    """Asks a mask about every block of `num_q` queries and `num_k` keys; nothing is assumed of run-time leaves."""
    if min(num_q, num_k, block_q, block_k) < 1:
        raise ValueError(
            f"lengths and block sizes must be at least 1, got {num_q} queries, {num_k} keys, "
            f"blocks of {block_q} by {block_k}"
        )
    rule = mask & KeyRange(None, num_k) if num_k % block_k else mask
    q0 = np.arange(0, num_q, block_q)[:, None]
    k0 = np.arange(0, num_k, block_k)[None, :]
    possible, certain = rule.block(q0, np.minimum(q0 + block_q, num_q), k0, k0 + block_k)
    shape = len(q0), k0.shape[1]
    possible, certain = np.broadcast_to(possible, shape), np.broadcast_to(certain, shape)
    query_blocks, key_blocks = np.nonzero(possible)
    row_starts = np.searchsorted(query_blocks, np.arange(shape[0] + 1)).astype(np.int32)
    is_full = certain[query_blocks, key_blocks]
    return BlockList(rule, num_q, num_k, block_q, block_k, row_starts, key_blocks.astype(np.int32), is_full)
