"""Causal softmax attention over a whole sequence, in plain `jnp`.

It knows no cache, no padding and no kernel. The one idea: query head `n` reads KV head `n // G` (GQA,
arXiv:2305.13245), written as a group axis so that keys and values are never repeated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def causal_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """Computes `softmax(q @ k.T / sqrt(H)) @ v`, position `t` over positions `s <= t`.

    Args:
      query: N heads, a multiple of K.
      key: K heads; positions already applied.
      value: K heads.

    Returns: Output in `query.dtype`; scores and softmax are float32.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32) * H**-0.5
    position = jnp.arange(T)
    visible = position[:, None] >= position[None, :]
    # A finite fill: a row that is masked altogether would give NaN with -inf.
    scores = jnp.where(visible[None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)
