"""`add_rms_norm` and `add_layer_norm`: the sum of a residual stream and what a layer adds, and its norm, in one go.

Meaning: `total = x + y` in their dtype, then `rms_norm(total)` or `layer_norm(total)` as in `passes.ops.norms`. FLOPs:
one more a number than the norm's. Bytes: both inputs, sum and norm once, where a kernel is selected. Shard rule: every
axis but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passes import compat
from passes.ops import norms


def add_rms_norm(x: Any, y: Any, *weight: Any, **params: Any) -> tuple[Any, Any]:
    """`(norm, sum)` of two arrays `[..., D]`; weight and parameters are those of `rms_norm_p`."""
    norm, total = add_rms_norm_p.bind(x, y, *weight, **params)
    return norm, total


def add_layer_norm(x: Any, y: Any, *extra: Any, **params: Any) -> tuple[Any, Any]:
    """`(norm, sum)` of two arrays `[..., D]`; weight, bias and parameters are those of `layer_norm_p`."""
    norm, total = add_layer_norm_p.bind(x, y, *extra, **params)
    return norm, total


def _make(name: str, norm: Any) -> Any:
    inner: Callable[..., Any] | None = compat.meaning_of(norm)
    if inner is None:
        raise ValueError(f"{norm} has no meaning")

    def meaning(x: Any, y: Any, *extra: Any, **params: Any) -> list[Any]:
        total = x + y
        return [inner(total, *extra, **params), total]

    def abstract(x: Any, y: Any, *extra: Any, **params: Any) -> list[Any]:
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(f"{name} takes two arrays of one shape and dtype, got {x} and {y}")
        for vector in extra:
            if tuple(vector.shape) != x.shape[-1:]:
                raise ValueError(f"{name} over rows of {x.shape[-1]} takes vectors of as many, got {vector.shape}")
        return [compat.shaped(x.shape, params["dtype"]), compat.shaped(x.shape, x.dtype)]

    return compat.derive_rules(compat.make_primitive(name, meaning, abstract))


add_rms_norm_p = _make("add_rms_norm", norms.rms_norm_p)
add_layer_norm_p = _make("add_layer_norm", norms.layer_norm_p)
