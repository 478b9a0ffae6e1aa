"""What a derived step remembers between calls: caches of rows, windows of the last rows, carried values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from passes.graph import Source, Value

Kind = Literal["kv", "window", "carry"]


@dataclass(eq=False)
class State:
    """One piece of state of a request; identity is the object.

    Attributes:
      kind: 'kv' keeps one row a token; 'window' the last `shape[0]` rows; 'carry' one value, replaced by each step.
      value: The value of the user's program that is kept.
      shape: For 'kv' the shape of a row, without time; else the whole shape.
      lead: Sizes of the layer loops it is stacked over, outermost first.
      time_dim: Where the time dimension stood in the value ('kv' and 'window').
    """

    kind: Kind
    value: Value
    shape: tuple[int, ...]
    dtype: Any
    source: Source
    time_dim: int = 0
    lead: tuple[int, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes a token for 'kv', else bytes a request."""
        return int(np.prod((*self.lead, *self.shape), dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def layers(self) -> int:
        """How many layers share this entry, each with a part of its own."""
        return int(np.prod(self.lead, dtype=np.int64))
