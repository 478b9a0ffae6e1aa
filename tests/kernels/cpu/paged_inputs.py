"""Paged pools with requests of odd lengths, and what float64 makes of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.kernels.attention import reference
from fastgpt_jax.kernels.attention.spec import AttentionSpec
from fastgpt_jax.kernels.cpu.attention import Scales
from passes.incremental.row_format import ROW_FORMATS
from passes.masks import Mask, Shifted, causal
from passes.scores import Alibi, Score


@dataclass(frozen=True)
class Step:
    """One step over pages.

    Attributes:
      starts: For each request, how many rows it has before the step; None for a row of padding.
      T: New rows of each request.
      owners: Whose pages each request reads, by number; requests that have the same one are tokens of one prompt.
      dtype: Of queries, and of pools where `pool` does not say.
    """

    starts: tuple[int | None, ...]
    T: int = 1
    owners: tuple[int, ...] | None = None
    mask: Mask = field(default_factory=lambda: Shifted(causal(), 0))
    page_size: int = 8
    N: int = 4
    K: int = 2
    H: int = 16
    E: int = 16
    layers: tuple[int, ...] = ()
    dtype: str = "float32"
    pool: str | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    score: Score | None = None
    num_shared_pages: int = 0

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.H**-0.5, self.mask, self.soft_cap, self.score)


@dataclass(frozen=True)
class Inputs:
    query: Any
    rows_k: Any
    rows_v: Any
    positions: Any
    pages: Any
    pool_k: Any
    pool_v: Any
    layers: Any
    num_keys: int
    leaves: Any
    sinks: Any
    scales: Any


def make_step(step: Step) -> Inputs:
    """Inputs as NumPy arrays. What no request has written is NaN, or the largest number of integers."""
    rng = np.random.default_rng(len(step.starts) + 100 * step.T + step.H)
    R, Z = len(step.starts), step.page_size
    longest = max(start or 0 for start in step.starts) + step.T
    M = -(-longest // Z) + 1
    owners = step.owners or tuple(range(R))
    P = M * (max(owners) + 1) + 1
    order = rng.permutation(P - 1).astype(np.int32)
    pages = np.stack([order[M * owner : M * (owner + 1)] for owner in owners])
    pages[:, : step.num_shared_pages] = pages[0, : step.num_shared_pages]
    starts = np.array([M * Z if start is None else start for start in step.starts], np.int32)
    positions = (starts[:, None] + np.arange(step.T)).astype(np.int32)
    pools = [_pool(rng, step, P, width) for width in (step.H, step.E)]
    for pool in pools:
        _spoil(pool, step, pages, positions, M * Z)
    rows = [rng.standard_normal((R, step.T, step.K, width)).astype(np.float32) for width in (step.H, step.E)]
    query = rng.standard_normal((R, step.T, step.N, step.H)).astype(np.float32)
    slopes = rng.uniform(0, 0.3, (1, step.N)).astype(np.float32)
    leaves = [starts, slopes, rng.integers(0, 2 ** min(step.T, 31), (R, step.T, 1)).astype(np.int32)]
    sinks = rng.standard_normal(step.N).astype(np.float32) if step.has_sinks else None
    kept = step.pool or step.dtype
    scales = None
    if kept == "int8":
        packed = [ROW_FORMATS["int8"].pack(jnp.asarray(np.nan_to_num(x))) for x in (*rows, *pools)]
        rows, pools = [np.asarray(x) for x, _ in packed[:2]], [np.asarray(x) for x, _ in packed[2:]]
        scales = Scales(*(np.asarray(scale) for _, scale in packed))
    else:
        rows, pools = ([np.asarray(jnp.asarray(x, kept)) for x in xs] for xs in (rows, pools))
    layers = [np.int32(layer) for layer in step.layers]
    query = np.asarray(jnp.asarray(query, step.dtype))
    return Inputs(
        query=query,
        rows_k=rows[0],
        rows_v=rows[1],
        positions=positions,
        pages=pages,
        pool_k=pools[0],
        pool_v=pools[1],
        layers=layers,
        num_keys=min(longest + 3, M * Z),
        leaves=leaves,
        sinks=sinks,
        scales=scales,
    )


def _pool(rng: np.random.Generator, step: Step, P: int, width: int) -> np.ndarray:
    sizes = [layer + 2 for layer in step.layers]
    return rng.standard_normal((*sizes, P, step.page_size, step.K, width)).astype(np.float32)


def _spoil(pool: np.ndarray, step: Step, pages: np.ndarray, positions: np.ndarray, size: int) -> None:
    written = np.zeros(pool.shape[len(step.layers) : len(step.layers) + 2], bool)
    for own, row in zip(pages, positions, strict=True):
        if row[0] < size:
            s = np.arange(row[0])
            written[own[s // step.page_size], s % step.page_size] = True
    pool[..., ~written, :, :] = np.nan


def written_pools(step: Step, i: Inputs) -> list[np.ndarray]:
    """The pools of keys and values after the writes, and with scales those of these."""
    pairs = [(i.rows_k, i.pool_k), (i.rows_v, i.pool_v)]
    if i.scales is not None:
        pairs += [(i.scales.rows_k, i.scales.pool_k), (i.scales.rows_v, i.scales.pool_v)]
    found = []
    for rows, pool in pairs:
        pool = pool.copy()
        for r, t in np.ndindex(i.positions.shape):
            p = i.positions[r, t]
            if p < i.pages.shape[1] * step.page_size:
                pool[(*step.layers, i.pages[r, p // step.page_size], p % step.page_size)] = rows[r, t]
        found.append(pool)
    return found


def float64_step(step: Step, i: Inputs) -> np.ndarray:
    """`[R, T, N, E]` of the reference in float64, rows that no request sees made zero; zeros for padding."""
    pools = [np.asarray(pool, np.float64) for pool in written_pools(step, i)]
    if i.scales is not None:
        pools = [pool * scale[..., None] for pool, scale in zip(pools[:2], pools[2:], strict=True)]
    s = np.arange(i.num_keys)
    key, value = (pool[step.layers][i.pages[:, s // step.page_size], s % step.page_size] for pool in pools)
    last = i.positions[:, -1]
    for owner in set(step.owners or ()):
        mine = [r for r, other in enumerate(step.owners or ()) if other == owner and step.starts[r] is not None]
        last = np.where(np.isin(np.arange(len(last)), mine), i.positions[mine].max(initial=0), last)
    there = (s <= last[:, None])[..., None, None]
    key, value = np.where(there, key, 0), np.where(there, value, 0)
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(reference.attend, step.spec))
        wide = [jnp.asarray(x, np.float64) for x in (i.query.astype(np.float64), key, value)]
        out, _ = run(*wide, [jnp.asarray(leaf) for leaf in i.leaves], i.sinks)
    is_padding = np.array([start is None for start in step.starts])
    return np.where(is_padding[:, None, None, None], 0, np.asarray(out))


ALIBI = Alibi(1)
