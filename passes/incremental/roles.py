"""Roles: which rows of a time dimension a step wants.

A step computes the forward at its capacity, restricted. Of each time dimension it wants either every row (`KEYS`:
what queries look at) or the rows of the new tokens (`Rows`), perhaps delayed (`shift`), perhaps with other axes
merged around them (`outer`, `inner`), as reshapes that join heads and time leave them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from passes.graph import Value


@dataclass(frozen=True)
class Keys:
    """All rows at capacity."""

    def __repr__(self) -> str:
        return "keys"


@dataclass(frozen=True)
class Rows:
    """The rows `position - shift` of the new tokens, in a dimension laid out as [outer, time, inner].

    A negative shift reads ahead of the token; only position-only values can answer it.
    """

    shift: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def copies(self) -> int:
        """How many entries of the dimension stand for one token."""
        return self.outer * self.inner

    def shifted(self, by: int) -> Rows:
        """The same rows, delayed by `by` more."""
        return Rows(self.shift + by, self.outer, self.inner)

    def indices(self, positions: Any, size: int) -> Any:
        """Absolute indices i32 [outer * T * inner] into a dimension of `size`; may lie outside it."""
        time = size // self.copies
        index = positions - self.shift
        if self.copies == 1:
            return index
        outer = jnp.arange(self.outer)[:, None, None] * time
        return ((outer + index[None, :, None]) * self.inner + jnp.arange(self.inner)).reshape(-1)

    def __repr__(self) -> str:
        merged = f", outer={self.outer}, inner={self.inner}" if self.copies > 1 else ""
        return f"rows({-self.shift:+d}{merged})" if self.shift or merged else "rows"


Role = Keys | Rows
KEYS = Keys()
ROWS = Rows()


@dataclass(frozen=True)
class Demand:
    """A value, and for each of its time dimensions in order the rows that are wanted."""

    value: Value
    roles: tuple[Role, ...] = ()

    @property
    def wants_rows(self) -> bool:
        return any(isinstance(r, Rows) for r in self.roles)

    @property
    def shift(self) -> int:
        """The largest shift in magnitude, sign kept; 0 if none."""
        return max((r.shift for r in self.roles if isinstance(r, Rows)), key=abs, default=0)
