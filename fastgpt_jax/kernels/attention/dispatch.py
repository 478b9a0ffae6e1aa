"""Attention by whichever implementation takes the arguments, differentiable whichever it is.

The one idea: the backward pass needs the inputs, the output and `lse`, so that one backward serves every forward. Where
nobody names an implementation the platform that the program is lowered for decides, not the devices of the moment.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fastgpt_jax.kernels.attention import pallas_tpu, reference, xla_blocked
from fastgpt_jax.kernels.attention.spec import AttentionSpec, Keys, Queries, Result, Sinks, Values, check
from fastgpt_jax.kernels.cpu import attention as cpu
from passes.masks import PerHead

IMPLEMENTATIONS: Mapping[str, ModuleType] = MappingProxyType(
    {"pallas_tpu": pallas_tpu, "xla_blocked": xla_blocked, "reference": reference, "cpu": cpu}
)


def attention(
    spec: AttentionSpec,
    query: Queries,
    key: Keys,
    value: Values,
    leaves: Sequence[Any] = (),
    sinks: Sinks | None = None,
    *,
    implementation: str | None = None,
) -> Result:
    """Attends; see `fastgpt_jax.kernels.attention.spec`.

    Differentiable once and in reverse, in queries, keys, values, sinks and leaves of floats.

    Args:
      implementation: One of `IMPLEMENTATIONS`; None takes the TPU kernel on TPUs where it takes the arguments, and
        blocked XLA otherwise. The TPU kernel named on another platform is interpreted. `cpu` runs on CPUs only, and
        where it is named: devices cannot share its work.

    Raises:
      NotImplementedError: The implementation declines, or every one does.
    """
    check(spec, query, key, value, leaves, sinks)
    return _attention(spec, _chosen(implementation, spec, query, key, value, leaves), query, key, value, leaves, sinks)


def attention_per_head(
    spec: AttentionSpec,
    masks: PerHead,
    query: Queries,
    key: Keys,
    value: Values,
    leaves: Sequence[Any] = (),
    sinks: Sinks | None = None,
    *,
    implementation: str | None = None,
) -> Result:
    """Attends with a mask for each query head, once for each distinct mask; `spec.mask` holds for all of them.

    A score function may use the head to read leaves, and for nothing else.
    """
    check(spec, query, key, value, leaves, sinks)
    N, K = query.shape[2], key.shape[2]
    if len(masks.masks) != N:
        raise ValueError(f"a mask for each of the {N} query heads is needed, got {len(masks.masks)}")
    outs, lses = [], []
    by_head = {read.leaf for read in spec.reads if read.by == "head"}
    for mask, heads in masks.heads.items():
        chosen = np.asarray(heads)
        kv_heads = _kv_heads(chosen, N // K)
        out, lse = attention(
            dataclasses.replace(spec, mask=spec.mask & mask),
            query[:, :, chosen],
            key[:, :, kv_heads],
            value[:, :, kv_heads],
            [leaf[:, chosen] if i in by_head else leaf for i, leaf in enumerate(leaves)],
            None if sinks is None else sinks[chosen],
            implementation=implementation,
        )
        outs.append(out)
        lses.append(lse)
    order = np.argsort(np.concatenate([np.asarray(heads) for heads in masks.heads.values()]))
    return jnp.concatenate(outs, axis=2)[:, :, order], jnp.concatenate(lses, axis=1)[:, order]


def _kv_heads(heads: np.ndarray, group: int) -> np.ndarray:
    """The KV heads for some query heads: each once where whole groups are taken, else one for each query head."""
    kv_heads, counts = np.unique(heads // group, return_counts=True)
    return kv_heads if (counts == counts[0]).all() else heads // group


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What runs: on TPUs, and elsewhere."""

    on_tpu: str
    elsewhere: str

    def run(self, spec: AttentionSpec, *arrays: Any) -> tuple[Array, Array]:
        elsewhere = functools.partial(_run, self.elsewhere, spec, interpret=True)
        if self.on_tpu == self.elsewhere != "pallas_tpu":
            return elsewhere(*arrays)
        on_tpu = functools.partial(_run, self.on_tpu, spec, interpret=False)
        return lax.platform_dependent(*arrays, tpu=on_tpu, default=elsewhere)


def _run(name: str, spec: AttentionSpec, *arrays: Any, interpret: bool) -> tuple[Array, Array]:
    options = {"interpret": interpret} if name == "pallas_tpu" else {}
    return IMPLEMENTATIONS[name].attend(spec, *arrays, **options)


def _chosen(name: str | None, spec: AttentionSpec, *arrays: Any) -> _Choice:
    if name is None:
        reasons = {n: module.supports(spec, *arrays) for n, module in IMPLEMENTATIONS.items() if module is not cpu}
        takes = [n for n, reason in reasons.items() if reason is None]
        return _Choice(takes[0], next(n for n in takes if n != "pallas_tpu"))
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)} or None, got {name!r}")
    if reason := IMPLEMENTATIONS[name].supports(spec, *arrays):
        raise NotImplementedError(f"{name} declines: {reason}")
    return _Choice(name, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(spec: AttentionSpec, choice: _Choice, query, key, value, leaves, sinks) -> tuple[Array, Array]:
    return choice.run(spec, query, key, value, leaves, sinks)


def _forward(spec: AttentionSpec, choice: _Choice, *arrays: Any) -> tuple[Any, Any]:
    result = choice.run(spec, *arrays)
    return result, (*arrays, result)


def _backward(spec: AttentionSpec, choice: _Choice, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    query, key, value, leaves, sinks, result = kept
    found = xla_blocked.gradients(spec, query, key, value, leaves, sinks, result, cotangents)
    return found.query, found.key, found.value, type(leaves)(found.leaves), found.sinks


_attention.defvjp(_forward, _backward)
