"""Causal softmax attention over a whole sequence, in plain `jnp`.

It knows no cache, no padding and no kernel. The one idea: query head `n` reads KV head `n // G` (GQA,
arXiv:2305.13245), written as a group axis so that keys and values are never repeated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: Float[Array, "N T T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `softmax(scale * q @ k.T + bias) @ v`, position `t` over positions `s <= t`.

    Args:
      query: N heads, a multiple of K.
      key: K heads; positions already applied.
      value: K heads.
      scale: None for `1 / sqrt(H)`.
      window: How many positions a query sees, its own included (`t - s < window`); None for all before it.
      softcap: Bound of the scaled scores, before the bias (`soft_cap`).
      bias: Added to the scores, for positions that act there (ALiBi).

    Returns: Output in `query.dtype`; scores and softmax are float32.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * (H**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    if bias is not None:
        scores = scores + bias.reshape(1, K, N // K, T, T)
    position = jnp.arange(T)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    # A finite fill: a row that is masked altogether would give NaN with -inf.
    scores = jnp.where(visible[None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)


def soft_cap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """`cap * tanh(x / cap)`: nearly `x` where it is small, never beyond `cap` (arXiv:2408.00118)."""
    return cap * jnp.tanh(x / cap)
