"""`flash_attn_func`: attention as the FlashAttention package's function of that name means it."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastgpt_jax.kernels.attention.dispatch import attention
from fastgpt_jax.kernels.attention.spec import AttentionSpec, Keys, Queries, Sinks, Values
from passes.masks import All, Mask, Offset
from passes.scores import Alibi

Output = Float[Array, "B T N E"]
Lse = Float[Array, "B N T"]


def flash_attn_func(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Float[Array, " N"] | Float[Array, "B N"] | None = None,
    sinks: Sinks | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Output | tuple[Output, Lse]:
    """Attends: `softmax(q k' * scale) v`, differentiable, in memory that grows with T plus S.

    Query i stands at key position `i + S - T`: where there are more keys than queries, the last ones are aligned. A
    query that sees no key gets zeros. Query head n reads KV head `n // (N // K)`.

    Args:
      causal: Whether a query sees no key after its position.
      window_size: How many keys before and after its position a query sees; -1 for no bound. With `causal` the second
        is 0.
      softmax_scale: None for `H ** -0.5`.
      softcap: Scores become `softcap * tanh(scores / softcap)`; 0 for none.
      alibi_slopes: `-slope * |i + S - T - j|` is added to the score of query i and key j, after the soft-cap.
      sinks: Logits that take part in the softmax and have no value.
      return_lse: Whether the log of the softmax's denominator is returned too, sinks counted; -inf for nothing visible.
      implementation: `pallas_tpu`, `xla_blocked` or `reference`; None for the best that takes the arguments.

    Returns: The output in the dtype of `q`, or that and `lse`.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"flash_attn_func takes q [B, T, N, H] and k [B, S, K, H], got {q.shape} and {k.shape}")
    shift = k.shape[1] - q.shape[1]
    leaves: list[Any] = []
    score = None
    if alibi_slopes is not None:
        leaves.append(jnp.atleast_2d(alibi_slopes))
        score = Alibi(0, shift)
    spec = AttentionSpec(
        # As float32 holds it: what is known to more digits is multiplied in two parts.
        scale=float(np.float32(1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale)),
        mask=_mask(causal, window_size, shift),
        soft_cap=softcap or None,
        score=score,
    )
    out, lse = attention(spec, q, k, v, leaves, sinks, implementation=implementation)
    return (out, lse) if return_lse else out


def _mask(causal: bool, window_size: tuple[int, int], shift: int) -> Mask:
    left, right = window_size
    if min(left, right) < -1:
        raise ValueError(f"window_size counts keys before and after, -1 for no bound, got {window_size}")
    before = None if left == -1 else left - shift
    after = 0 if causal else None if right == -1 else right
    return All() & Offset(None if after is None else -after - shift, before)
