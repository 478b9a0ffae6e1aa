"""What asks for an embedding of a prompt instead of a continuation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PoolingParams:
    """Takes the last `hidden` of a prompt, what the projection to the vocabulary would read, at length 1 (L2)."""
