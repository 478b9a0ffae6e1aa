"""How two runs of a model are compared: by the largest difference, in parts of the largest logit."""

from __future__ import annotations

import numpy as np

TOLERANCE = 1e-4
"""Largest difference in parts of the largest logit: float32 sums in another order reach 1e-6 on the models tried."""


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest logit wanted; infinite where only one is finite.

    What is larger than that, as the fill of -1e9 on ids nobody may choose, is compared with its own magnitude.
    """
    finite = np.isfinite(want)
    if (np.isfinite(got) != finite).any():
        return float("inf")
    if not finite.any():
        return 0.0
    magnitudes = np.abs(want[finite])
    return float((np.abs(got[finite] - want[finite]) / np.maximum(magnitudes, largest_logit(magnitudes))).max())


def largest_logit(magnitudes: np.ndarray) -> float:
    """The largest magnitude, those left out that lie beyond a whole empty decade: they are fills and no logits."""
    largest = magnitudes.max(initial=1e-30)
    for edge in 10.0 ** np.arange(3, 38):
        if largest < edge:
            break
        ordinary = magnitudes.max(initial=0.0, where=magnitudes < edge)
        if ordinary > 0 and not ((magnitudes >= edge) & (magnitudes < 10 * edge)).any():
            return float(ordinary)
    return float(largest)
