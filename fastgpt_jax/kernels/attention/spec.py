"""What is computed by every implementation of attention: its static part as one hashable value, and checks of the rest.

For one request, query head n, query at position t, keys s, with `kv = n // (N // K)` (GQA, arXiv:2305.13245):

    a[t, s] = score(soft_cap * tanh(scale * q[t, n] . k[s, kv] / soft_cap), n, t, s)    where the mask holds (t, s)
    lse[n, t] = log(sum over s of exp(a[t, s]) + exp(sink[n]))                           without sinks: no second term
    out[t, n] = sum over s of exp(a[t, s] - lse[n, t]) v[s, kv]

A query that sees no key gets zeros, and the log of its sink, or -inf, as `lse`. Keys that fail what the mask says of
keys alone (`passes.masks.key_rule`: past the length, say) may hold anything in their rows, even NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from passes.masks import All, Mask, Read, key_rule
from passes.scores import Score

Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Values = Float[Array, "B S K E"]
Sinks = Float[Array, " N"]
Result = tuple[Float[Array, "B T N E"], Float[Array, "B N T"]]
"""The output in the dtype of the queries, and `lse`, in float32 or wider."""


@dataclass(frozen=True)
class AttentionSpec:
    """The static part of an attention.

    Attributes:
      scale: What products of queries and keys are multiplied by.
      soft_cap: Bound of the scores, None for none (arXiv:2408.00118).
    """

    scale: float
    mask: Mask = All()
    soft_cap: float | None = None
    score: Score | None = None

    @property
    def reads(self) -> tuple[Read, ...]:
        """How the mask and the score function read leaves, each once."""
        return tuple(dict.fromkeys((*self.mask.reads, *(self.score.reads if self.score else ()))))

    def capped(self, products: Array) -> Array:
        """Products of queries and keys scaled, and squeezed smoothly between `-soft_cap` and `soft_cap`."""
        if self.soft_cap is None:
            return times(products, self.scale)
        return self.soft_cap * jnp.tanh(times(products, self.scale / self.soft_cap))

    def scores(self, products: Array, head: Any, q: Any, k: Any, leaves: Sequence[Any]) -> Array:
        """Scores of one request before the mask, `[K, G, T, S]`, for `q [T, 1]` and `k [1, S]`."""
        scores = self.capped(products)
        return scores if self.score is None else self.score.apply(scores, head, q[None, None], k[None, None], leaves)


def times(x: Array, factor: float) -> Array:
    """A product with a number that float32 may not hold: by its inverse, or in two parts, where those are exact."""
    near = float(np.float32(factor))
    if near == factor:
        return x * factor
    inverse = 1 / factor
    if abs(float(np.float32(inverse)) - inverse) <= 2**-50 * abs(inverse):
        return x / float(np.float32(inverse))
    return x * near + x * (factor - near)


def check(spec: AttentionSpec, query: Any, key: Any, value: Any, leaves: Sequence[Any] = (), sinks: Any = None) -> None:
    """Raises ValueError where arrays do not fit each other; leaves lead with an axis of requests, of 1 or B."""
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            "attention takes query [B, T, N, H], key [B, S, K, H] and value [B, S, K, E], "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if key.shape[0] != B or key.shape[3] != H or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "query [B, T, N, H], key [B, S, K, H] and value [B, S, K, E] must agree in B, S, K and H, "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    if N % K:
        raise ValueError(f"query heads must be a multiple of KV heads, got N={N} and K={K}")
    if min(T, S) < 1:
        raise ValueError(f"attention needs a query and a key at least, got T={T} and S={S}")
    if spec.soft_cap is not None and spec.soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, or None for none, got {spec.soft_cap}")
    if sinks is not None and tuple(sinks.shape) != (N,):
        raise ValueError(f"sinks must be one number for each of the {N} query heads, got {tuple(sinks.shape)}")
    _check_leaves(spec, leaves, B, {"query": T, "key": S, "head": N})


def _check_leaves(spec: AttentionSpec, leaves: Sequence[Any], num_requests: int, sizes: dict[str, int]) -> None:
    for read in spec.reads:
        if read.leaf >= len(leaves):
            raise ValueError(f"the mask or score function reads leaf {read.leaf}, and there are {len(leaves)} leaves")
        shape = tuple(leaves[read.leaf].shape)
        rank = {"request": 1, "block": 3, "head_key": 3, "head_pair": 4}.get(read.by, 2) + (read.word is not None)
        if len(shape) != rank or shape[0] not in (1, num_requests):
            raise ValueError(
                f"leaf {read.leaf} is read by {read.by}, so it must have {rank} axes, the first of 1 or "
                f"{num_requests} requests, got {shape}"
            )
        if read.by in sizes and shape[1] < sizes[read.by]:
            raise ValueError(f"leaf {read.leaf} must hold {sizes[read.by]} elements by {read.by}, got {shape}")


def over_requests(fn: Callable[..., Any], num_arrays: int, leaves: Sequence[Any]) -> tuple[Callable[..., Any], list]:
    """Maps a function of one request's arrays and its list of leaves over requests.

    Returns: The mapped function of `num_arrays` batched arrays and leaves, and leaves to call it with: those that are
      the same for all requests lose their axis and stay unmapped.
    """
    shared = [leaf.shape[0] == 1 for leaf in leaves]
    axes = [None if is_shared else 0 for is_shared in shared]
    mapped = jax.vmap(fn, in_axes=(*[0] * num_arrays, axes))
    return mapped, [leaf[0] if is_shared else leaf for leaf, is_shared in zip(leaves, shared, strict=True)]


def without_dead_keys(mask: Mask, key: Array, value: Array, leaves: Sequence[Any]) -> tuple[Array, Array]:
    """Zeros, in one request's keys and values `[S, ...]`, in place of rows that no query sees by the rule of keys.

    0 times NaN is NaN, so that a weight of 0 does not keep the garbage of such rows out of the result.
    """
    rule = key_rule(mask)
    if rule == All():
        return key, value
    live = rule.contains(jnp.zeros((), jnp.int32), jnp.arange(key.shape[0], dtype=jnp.int32), leaves)[:, None, None]
    return jnp.where(live, key, jnp.zeros_like(key)), jnp.where(live, value, jnp.zeros_like(value))
