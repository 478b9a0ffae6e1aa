"""Attention with linear biases (ALiBi, arXiv:2108.12409): a score falls with the distance of its key.

Knows positions and heads, no model. The one idea: each head has its own slope, a power of one base; a number of heads
that is no power of two takes the rest from the sequence of twice as many heads.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slope of each head, float32 [N]."""
    nearest = 1 << (num_heads.bit_length() - 1)

    def powers(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    return np.concatenate([powers(nearest), powers(2 * nearest)[::2][: num_heads - nearest]]).astype(np.float32)


def alibi_bias(num_heads: int, num_tokens: int) -> Float[Array, "N T T"]:
    """`-slope * (t - s)` for position `t` and key `s`, float32; of no meaning for keys that come later."""
    position = jnp.arange(num_tokens).astype(jnp.float32)
    distance = position[:, None] - position[None, :]
    return -jnp.asarray(alibi_slopes(num_heads))[:, None, None] * distance[None]
