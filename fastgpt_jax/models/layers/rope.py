"""Rotary position embeddings (RoPE, arXiv:2104.09864) and the ways of stretching them to longer contexts.

Knows positions and head dimensions, no model. The one idea: a scaling changes the H/2 frequencies once, for every
length alike, so that the rotation at a position is a function of that position. Scalings whose frequencies depend on
the length of the sequence (`dynamic`) do not fit, and a cached key would be wrong under them; of the two sets of
`longrope` one is chosen before the model is built.

Frequencies are NumPy float64 at trace time, rounded to float32 once.
"""

import abc
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastgpt_jax.errors import UserError

Rotation = tuple[Float[Array, "T h"], Float[Array, "T h"]]  # Cosines and sines of every position, h = rotary_dim / 2.


class RopeScaling(abc.ABC):
    """A change of the rotation frequencies that makes a model trained on short contexts read longer ones."""

    @abc.abstractmethod
    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The scaled frequencies [H/2], from the unscaled ones `theta**(-2i/H)`, in radians a token."""

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation (arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float

    def __post_init__(self):
        _require_positive(self, "factor")

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's: low frequencies divided by `factor`, high ones kept, a blend linear in the frequency between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        _require_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                "llama3 rope scaling needs high_freq_factor > low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return _blend(frequencies, frequencies / self.factor, np.clip(kept, 0.0, 1.0))


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv:2309.00071): fast dimensions kept, slow ones interpolated, a ramp between, and a larger amplitude.

    `attention_factor` is the amplitude, None for the paper's `0.1 ln(factor) + 1` (or its quotient by `mscale` and
    `mscale_all_dim` where both are given and not 0). `truncate` rounds the ends of the ramp outward to whole
    dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _require_positive(self, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._log_scale(self.mscale) / self._log_scale(self.mscale_all_dim)
        return self._log_scale(1.0)

    def _log_scale(self, multiplier: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * multiplier * math.log(self.factor) + 1.0

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        num_frequencies = len(frequencies)

        def dimension_turning(num_turns: float) -> float:
            """The (fractional) index of the frequency that makes `num_turns` turns over the original context."""
            per_token = 2 * math.pi * num_turns / self.original_max_position_embeddings
            return -num_frequencies * math.log(per_token) / math.log(theta)

        low, high = dimension_turning(self.beta_fast), dimension_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num_frequencies - 1)
        if low == high:
            high += 0.001
        kept = 1.0 - np.clip((np.arange(num_frequencies) - low) / (high - low), 0.0, 1.0)
        return _blend(frequencies, frequencies / self.factor, kept)


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE (arXiv:2402.13753): each frequency divided by a searched factor of its own, and a larger amplitude.

    There is one set of factors for texts within the original length and one for longer ones, and a model serves with
    one of them: the long ones where `max_model_len` exceeds the original length. `factor` is how far the context was
    stretched; `attention_factor` is the amplitude, None for `sqrt(1 + ln(factor) / ln(original length))`.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    max_model_len: int
    attention_factor: float | None = None

    def __post_init__(self):
        _require_positive(self, "original_max_position_embeddings", "factor", "max_model_len")
        if not all(factor > 0 for factor in (*self.short_factor, *self.long_factor)):
            raise UserError("rope scaling needs short_factor and long_factor > 0")

    @property
    def is_long(self) -> bool:
        """Whether the long factors are the ones in use."""
        return self.max_model_len > self.original_max_position_embeddings

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def scale(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        name, factors = ("long_factor", self.long_factor) if self.is_long else ("short_factor", self.short_factor)
        if len(factors) != len(frequencies):
            raise UserError(
                f"longrope rope scaling needs {len(frequencies)} numbers in {name}, half the rotated dimension of a "
                f"head, got {len(factors)}"
            )
        return frequencies / np.asarray(factors, np.float64)


def make_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Rotation frequencies [rotary_dim / 2] in radians a token, float32."""
    frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if scaling is not None:
        frequencies = scaling.scale(frequencies, theta)
    return frequencies.astype(np.float32)


def rope_table(positions: Int[Array, " T"], rotary_dim: int, theta: float, scaling: RopeScaling | None) -> Rotation:
    """Cosines and sines of the rotation angles, float32, with h = rotary_dim / 2."""
    frequencies = jnp.asarray(make_frequencies(rotary_dim, theta, scaling))
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "T h"], sin: Float[Array, "T h"]
) -> Float[Array, "B T N H"]:
    """Rotates dimension pairs `(i, i + h)` by their angle, in float32 (Hugging Face's order, not the paper's).

    What lies beyond the first `2 * h` dimensions of a head stays as it is.
    """
    num_pairs, H = cos.shape[-1], x.shape[-1]
    rotated, kept = (x, None) if 2 * num_pairs == H else (x[..., : 2 * num_pairs], x[..., 2 * num_pairs :])
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if kept is None else jnp.concatenate([rotated, kept], axis=-1)


def _blend(fast: np.ndarray, slow: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return fast * kept + slow * (1.0 - kept)


def _require_positive(scaling: RopeScaling, *names: str) -> None:
    for name in names:
        if not getattr(scaling, name) > 0:
            raise UserError(f"rope scaling needs {name} > 0, got {getattr(scaling, name)}")
