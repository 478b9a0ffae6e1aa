"""Forwards of a few layers of attention and nothing else, as a user writes them, with the same under a dense mask.

The one idea: the oracle is the same function given a mask as an array, so that it shares nothing with what rewrites it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

N, K, H = 4, 2, 8


def weights(num_layers: int, *, seed: int = 0) -> Any:
    random = np.random.RandomState(seed)
    return {
        name: random.randn(num_layers, N * H, heads * H).astype(np.float32) / 5
        for name, heads in (("q", N), ("k", K), ("v", K), ("o", N))
    }


def inputs(length: int, *, batch: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.RandomState(seed).randn(batch, length, N * H).astype(np.float32)


def layer(w: Any, x: Any, seen: Any) -> Any:
    """One layer of grouped attention.

    Args:
      seen: None for a causal mask; else an array [N, T, T] that is ANDed with it.
    """
    B, T, _ = x.shape
    q = (x @ w["q"]).reshape(B, T, K, N // K, H)
    k, v = ((x @ w[name]).reshape(B, T, K, H) for name in "kv")
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / np.float32(H**0.5)
    mask = jnp.tril(jnp.ones((T, T), bool))
    if seen is not None:
        mask = (mask & seen).reshape(K, N // K, T, T)
    scores = jnp.where(mask, scores, np.float32(-1e30))
    out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, axis=-1), v)
    return x + out.reshape(B, T, N * H) @ w["o"]


def written_out(w: Any, x: Any, seen: Sequence[Any] | None = None) -> Any:
    """The layers one after the other; `seen` an array a layer."""
    for i in range(len(w["q"])):
        x = layer(jax.tree.map(lambda leaf, i=i: leaf[i], w), x, None if seen is None else seen[i])
    return x


def in_a_loop(w: Any, x: Any) -> Any:
    return lax.scan(lambda x, w: (layer(w, x, None), None), x, w)[0]


def dense(rule: str, length: int) -> np.ndarray:
    """A few rules written out in NumPy, `[T, T]`."""
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    return {
        "full": np.ones((length, length), bool),
        "window(3)": q - k < 3,
        "window(3) | sinks(2)": (q - k < 3) | (k < 2),
        "sinks(2)": np.broadcast_to(k < 2, (length, length)),
    }[rule]
