"""Deterministic weights for tiny models, so that goldens need not store them.

NumPy alone. The one idea: a tensor depends on its name and shape only, through the legacy generator, whose stream NumPy
promises never to change.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def make_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Float32 tensors by Hugging Face name: norm weights around one, everything else around zero."""
    return {name: _make_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def _make_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.3
    is_norm_weight = len(shape) == 1 and name.endswith("weight")
    return (values + (1.0 if is_norm_weight else 0.0)).astype(np.float32)
