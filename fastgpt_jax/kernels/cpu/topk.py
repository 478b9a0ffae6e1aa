"""The largest numbers of rows on CPUs, as `jax.lax.top_k` gives them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastgpt_jax.kernels.cpu import library


def top_k_refusal(x: Any) -> str | None:
    """Why `top_k` declines rows of this shape and dtype; None where it takes them."""
    if x.dtype != jnp.float32:
        return f"it compares float32, got {x.dtype}"
    return library.unusable_reason()


def top_k(x: Float[Array, "*B V"], k: int) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """The k largest numbers of each row and where they are: the largest first, of equal ones the first, NaN above all.

    Raises:
      NotImplementedError: `top_k_refusal` declines.
    """
    if reason := top_k_refusal(x):
        raise NotImplementedError(f"the native CPU kernel declines: {reason}")
    *batch, V = x.shape
    if not 1 <= k <= V:
        raise ValueError(f"top_k takes between 1 and all {V} numbers of a row, got k={k}")
    R = math.prod(batch)
    if R == 0:
        return jnp.zeros((*batch, k), jnp.float32), jnp.zeros((*batch, k), jnp.int32)
    results = (jax.ShapeDtypeStruct((R, k), jnp.float32), jax.ShapeDtypeStruct((R, k), jnp.int32))
    values, indices = jax.ffi.ffi_call("fastgpt_topk", results, vmap_method="sequential")(x.reshape(R, V))
    return values.reshape(*batch, k), indices.reshape(*batch, k)
