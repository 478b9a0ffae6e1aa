"""Which rows a step reads where a mask holds only some, and scores that know the true positions of these rows.

A query at `start + t` sees keys in a band around it and in fixed ranges: rows read are the fixed ones, then the band of
all queries of the step. The one idea: a row that is in both, or that does not exist, stands at a position that the mask
cannot hold, so the program's own mask hides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.attention.expression import ROLES, Apply, Expression, Index, Leaf, rewrite
from passes.sparse_attention.support import Support


@dataclass(frozen=True)
class ReadPositions:
    """Rows for `num_queries` queries of a request over a cache of `capacity` positions."""

    support: Support
    num_queries: int
    capacity: int

    @property
    def num_rows(self) -> int:
        return self.support.num_rows(self.num_queries)

    def place_of(self, first: int, end: int) -> int | None:
        """Where fixed rows `[first, end)` lie among the rows read; None where they are not all read."""
        before = 0
        for low, high in self.support.ranges:
            if low <= first and end <= min(high, self.capacity):
                return before + first - low
            before += high - low
        return None

    def make(self, start: Any) -> tuple[Any, Any]:
        """Positions to read and what the scores take them for, i32 `[B, S]` each, from where queries begin, `[B]`."""
        start = start.astype(jnp.int32)[:, None]
        fixed = np.concatenate([np.arange(first, end) for first, end in self.support.ranges] or [np.zeros(0)])
        fixed = jnp.asarray(fixed[None], jnp.int32)
        positions, is_seen = [jnp.broadcast_to(fixed, (start.shape[0], fixed.shape[1]))], [fixed < self.capacity]
        last_fixed = max((end for _, end in self.support.ranges), default=0)
        outside = jnp.zeros_like(start)
        if self.support.band is not None:
            lo, hi = self.support.band
            band = jnp.arange(-hi, self.num_queries - lo, dtype=jnp.int32)[None] + start
            is_seen[0] = is_seen[0] & ((fixed < band[:, :1]) | (fixed > band[:, -1:]))
            positions.append(band)
            is_seen.append((band >= 0) & (band < self.capacity))
            outside = jnp.maximum(start + self.num_queries - lo, 0)
        found = jnp.concatenate(positions, axis=1)
        shown = jnp.concatenate([jnp.broadcast_to(x, p.shape) for x, p in zip(is_seen, positions, strict=True)], axis=1)
        return jnp.clip(found, 0, self.capacity - 1), jnp.where(shown, found, outside + last_fixed)


def with_positions(score: Expression, number: int, moved: set[int]) -> Expression:
    """The scores with the index of a key read from leaf `number`.

    Args:
      moved: Leaves that run along the keys, and now differ between requests.
    """

    def change(node: Expression) -> Expression | None:
        if isinstance(node, Index) and node.role == "s":
            leaf = Leaf(number, ("b", "s"), "int32")
            if node.dtype == "int32":
                return leaf
            params = (("new_dtype", np.dtype(node.dtype)), ("sharding", None), ("weak_type", False))
            return Apply(lax.convert_element_type_p, params, (leaf,))
        if isinstance(node, Leaf) and node.number in moved:
            return Leaf(node.number, tuple(r for r in ROLES if r == "b" or r in node.roles), node.dtype)
        return None

    return rewrite(score, change)
