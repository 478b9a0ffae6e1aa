"""What a rewrite may do to numbers; a leaf, so that rewrites and passes can both say it."""

from __future__ import annotations

import enum


class Numerics(enum.Enum):
    """What a pass may do to results."""

    EXACT = "exact"  # bit for bit, operation by operation
    REASSOCIATES = "reassociates"  # equal in real numbers, rounded elsewhere
    APPROXIMATE = "approximate"  # within a budget that the pass states
    LOSSY = "lossy"  # other numbers, as it was asked to: what is left out does not come back
