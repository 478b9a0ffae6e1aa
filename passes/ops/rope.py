"""`rope`: rotates pairs of numbers of the last axis by angles given as cosines and sines (arXiv:2104.09864).

Meaning, for pair i of H / 2, first at i and second at i + H / 2, or side by side where `is_interleaved`:

    out.first  = x.first * cos.first - x.second * sin.first
    out.second = x.second * cos.second + x.first * sin.second

Cosines and sines have H / 2 numbers, one a pair, or H. FLOPs: 3 a number. Bytes: input, cosines, sines and result once,
where a kernel is selected. Shard rule: every axis but the last.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from passes import compat
from passes.ops.norms import wide


def rope(x: Any, cos: Any, sin: Any, *, is_interleaved: bool, dtype: Any = None) -> Any:
    """Rotates.

    Args:
      x: `[..., H]`.
      cos, sin: Of the rank of `x`, the last axis of H or H / 2 numbers, the others as in `x` or of size 1.
      dtype: Of the result; by default that of `x`.
    """
    return rope_p.bind(x, cos, sin, is_interleaved=is_interleaved, dtype=np.dtype(x.dtype if dtype is None else dtype))


def _meaning(x: Any, cos: Any, sin: Any, *, is_interleaved: bool, dtype: Any) -> Any:
    H, pair = x.shape[-1], -1 if is_interleaved else -2
    x, cos, sin = wide(x), wide(cos), wide(sin)

    def halves(v: Any) -> tuple[Any, Any]:
        if v.shape[-1] * 2 == H:
            return v, v
        paired = v.reshape(*v.shape[:-1], *((-1, 2) if is_interleaved else (2, -1)))
        return jnp.take(paired, 0, axis=pair), jnp.take(paired, 1, axis=pair)

    (first, second), (cos_first, cos_second), (sin_first, sin_second) = halves(x), halves(cos), halves(sin)
    rotated = [first * cos_first - second * sin_first, second * cos_second + first * sin_second]
    return jnp.stack(rotated, axis=pair).reshape(x.shape).astype(dtype)


def _abstract(x: Any, cos: Any, sin: Any, *, is_interleaved: bool, dtype: Any) -> Any:
    for v in (cos, sin):
        fits = all(a in (1, b) for a, b in zip(v.shape[:-1], x.shape[:-1], strict=True))
        if not fits or x.shape[-1] % 2 or v.shape[-1] not in (x.shape[-1], x.shape[-1] // 2):
            raise ValueError(f"rope of {x.shape} takes cosines and sines of H or H / 2 numbers, got {v.shape}")
    return compat.shaped(x.shape, dtype)


rope_p = compat.derive_rules(compat.make_primitive("rope", _meaning, _abstract, multiple_results=False))
