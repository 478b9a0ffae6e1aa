"""Serving steps of one or more layers of attention over paged caches, as the derivation writes them, masks written out.

The one idea: requests stand where a test puts them, and every row of the pools that no token of theirs has written is
NaN, so that what reads too much shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.ops.kv_update_read import kv_update_read

K, G, H, Z = 2, 2, 4, 4
"""KV heads, query heads of each, their width, tokens of a page."""
Seen = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Step:
    """A step of T tokens of R requests over caches of `capacity` tokens.

    Attributes:
      seen: Which key position a query position sees, beside causality.
      is_int8: Whether caches hold small integers and a scale a vector.
      in_loop: Whether the layers run in a loop, their pools stacked.
    """

    seen: Seen
    capacity: int = 32
    num_layers: int = 1
    is_int8: bool = False
    in_loop: bool = False
    bias: bool = False

    def __call__(self, pools: Any, x: Any, start: Any, count: Any, pages: Any) -> Any:
        """One step.

        Args:
          pools: Dict of arrays `[layers, P, Z, K, H]`.
          x: Hidden rows f32 `[R, T, K * G * H]`.
        """

        def one(x: Any, start: Any, count: Any, pages: Any) -> Any:
            return self._request(pools, x, start, count, pages)

        return jax.vmap(one, out_axes=(0, None))(x, start, count, pages)

    def _request(self, pools: Any, x: Any, start: Any, count: Any, pages: Any) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            x, pools = carry
            return self._layer(pools, index, x, start, count, pages), None

        carry = (x, pools)
        if self.in_loop:
            return lax.scan(layer, carry, jnp.arange(self.num_layers, dtype=jnp.int32))[0]
        for index in range(self.num_layers):
            carry, _ = layer(carry, jnp.int32(index))
        return carry

    def _layer(self, pools: Any, index: Any, x: Any, start: Any, count: Any, pages: Any) -> Any:
        T, S = x.shape[0], self.capacity
        positions = start + jnp.arange(T, dtype=jnp.int32)
        where = jnp.where(jnp.arange(T) < count, positions, jnp.iinfo(jnp.int32).max)
        pools, views = dict(pools), {}

        def through(name: str, rows: Any) -> Any:
            view, pools[name] = kv_update_read(pools[name], [index], rows, where, pages, length=S)
            return view

        q = x.reshape(T, K, G, H)
        for name, rows in (("k", q[:, :, 0] + 1.0), ("v", q[:, :, 1] * 2.0)):
            if self.is_int8:
                scale = jnp.max(jnp.abs(rows), axis=-1) / 127
                view = through(name, jnp.round(rows / scale[..., None]).astype(jnp.int8))
                view = view.astype(jnp.float32) * through(f"{name}_scale", scale)[..., None]
            else:
                view = through(name, rows)
            written = jnp.arange(S) < start + count
            views[name] = jnp.where(written[:, None, None], view, view[:1])
        k = jnp.arange(S)
        if self.bias:
            views["k"] = views["k"] * jnp.cos(k.astype(jnp.float32) / 9)[:, None, None]  # as rotations of keys do
        scores = jnp.einsum("tkgh,skh->kgts", q, views["k"]) * np.float32(H**-0.5)
        if self.bias:
            slopes = jnp.array([[0.5, 0.25], [0.125, 0.1]], jnp.float32)
            scores = scores - slopes[:, :, None, None] * (positions[:, None] - k[None]).astype(jnp.float32)
        mask = (k[None] <= positions[:, None]) & self.seen(positions[:, None], k[None])
        weights = jax.nn.softmax(jnp.where(mask, scores, np.float32(-1e30)), axis=-1)
        out = jnp.einsum("kgts,skh->tkgh", weights, views["v"])
        return x + out.reshape(T, K * G * H), pools

    def arguments(self, num_tokens: int, starts: Any, counts: Any, *, seed: int = 0) -> tuple[Any, ...]:
        """Arguments with requests at given places; what they have not written is NaN, or a number of no meaning."""
        random = np.random.default_rng(seed)
        num_requests, per_request = len(starts), self.capacity // Z
        pages = random.permutation(num_requests * per_request + 3)[: num_requests * per_request]
        pages = pages.reshape(num_requests, per_request).astype(np.int32)
        shape = (self.num_layers, num_requests * per_request + 3, Z, K)
        pools: dict[str, np.ndarray] = {}
        for name in "kv":
            floats = np.full((*shape, H), np.nan, np.float32)
            scales = np.full(shape, np.nan, np.float32)
            for row, start in zip(pages, starts, strict=True):
                for p in range(start):
                    place = (slice(None), row[p // Z], p % Z)
                    floats[place] = random.standard_normal((self.num_layers, K, H))
                    scales[place] = np.abs(random.standard_normal((self.num_layers, K))) / 64
            if self.is_int8:
                pools[f"{name}_scale"] = scales
                floats = np.where(np.isnan(floats), 99, floats * 40).clip(-127, 127).astype(np.int8)
            pools[name] = floats
        x = random.standard_normal((num_requests, num_tokens, K * G * H)).astype(np.float32)
        return pools, x, np.asarray(starts, np.int32), np.asarray(counts, np.int32), pages


def valid_rows(x: Any, counts: Any) -> np.ndarray:
    """The rows of valid tokens."""
    x = np.asarray(x)
    return x[np.arange(x.shape[1])[None] < np.asarray(counts)[:, None]]
