"""What the compiler would do with a model: what is cached, what is carried, what mixes tokens, what is refused.

Needs shapes only. Causality is a matter of values: it is tried on random numbers where a model is small, and
otherwise the explanation says that nothing is certified.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpt_jax.artifact.cache_layout import CacheEntry, CacheLayout
from fastgpt_jax.checkpoint import LoadedModel
from fastgpt_jax.compiler.capture import Captured, as_forward, capture
from fastgpt_jax.compiler.certify import Certificate, certify
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.decode_cost import count_flops
from fastgpt_jax.compiler.program import make_program
from passes import compat
from passes.incremental.derive import derive
from passes.incremental.errors import NotServable

MAX_RANDOM_PARAMS = 20_000_000
"""Parameters up to which random values are made to try causality: two seconds of compiling and running on two cores."""
MAX_RANDOM_FORWARD_FLOPS = 5e10
MAX_NAMES = 4
"""Names written out of cache entries that are alike."""


@dataclass(frozen=True)
class Explanation:
    """What was found.

    Attributes:
      num_params: Elements of all parameters.
      capacity: Tokens of a request the step was derived for.
      layout: What is kept; None for a refused model.
      mixing: What mixes tokens, with how often it occurs.
      flops: FLOPs of (a decode step, one more token in the forward, expanding cached latents), at capacity.
      certificate: None where nothing was certified.
      refusal: Why the model is not served, or None.
      not_certified: Why there is no certificate, or None.
    """

    num_params: int
    capacity: int
    layout: CacheLayout | None
    mixing: tuple[tuple[str, int], ...]
    flops: tuple[int, int, int] | None
    certificate: Certificate | None
    refusal: NotServable | None
    not_certified: str | None

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(model: Any, params: Any = None, config: CompileConfig = CompileConfig(max_model_len=512)) -> Explanation:
    """Explains what a compile would do.

    Args:
      model: As for `compile`.
      params: Arrays or `ShapeDtypeStruct`s.

    Raises:
      UserError: the forward cannot be traced at all.
    """
    if isinstance(model, LoadedModel):
        model = model.model
    forward, params = as_forward(model, params, config.arguments)
    leaves = jax.tree.leaves(params)
    num_params = int(sum(np.prod(np.shape(x), dtype=np.int64) for x in leaves))
    max_model_len = config.max_model_len or 512
    try:
        captured = capture(forward, params, max_model_len)
        plan = derive(captured.graph, captured.times, captured.token_input)
    except NotServable as refusal:
        return Explanation(num_params, max_model_len, None, (), None, None, refusal, None)
    program = make_program(captured.graph, plan, num_slots=config.max_num_seqs, unroll=False)
    flops = count_flops(captured, program)
    certificate, refusal, reason = _try_certificate(captured, program, leaves, num_params)
    if refusal is not None:
        return Explanation(num_params, captured.capacity, None, (), None, None, refusal, None)
    return Explanation(
        num_params, captured.capacity, program.layout(), _mixing(program), flops, certificate, None, reason
    )


def _try_certificate(
    captured: Captured, program: Program, leaves: Sequence[Any], num_params: int
) -> tuple[Certificate | None, NotServable | None, str | None]:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        if num_params > MAX_RANDOM_PARAMS:
            return None, None, f"{num_params:,} parameters without values are too many to try random ones"
        leaves = random_leaves(leaves)
    try:
        return certify(captured, program, leaves, flop_budget=MAX_RANDOM_FORWARD_FLOPS), None, None
    except NotServable as refusal:
        return None, refusal, None


def random_leaves(leaves: Sequence[Any], seed: int = 0) -> list[Any]:
    """Values for parameters known by shape: normal numbers scaled by fan-in, PRNG keys from the seed."""
    rng = np.random.default_rng(seed)
    out = []
    for leaf in leaves:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            out.append(leaf)
        elif compat.is_extended_dtype(leaf.dtype):
            out.append(jnp.reshape(jax.random.split(jax.random.key(seed), max(leaf.size, 1))[: leaf.size], leaf.shape))
        elif jnp.issubdtype(leaf.dtype, jnp.inexact):
            fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
            values = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in)
            out.append(jnp.asarray(values).astype(leaf.dtype))
        else:
            out.append(jnp.zeros(leaf.shape, leaf.dtype))
    return out


_MIXERS = {
    "dot_general": "products over the cached tokens",
    "gather": "look-ups among the cached tokens",
    "associative_scan": "associative scans over tokens",
    "conv_general_dilated": "causal convolutions",
    "cumsum": "running sums",
    "cumprod": "running products",
    "cummax": "running maxima",
    "cummin": "running minima",
    "cumlogsumexp": "running log-sum-exps",
}


def _mixing(program: Program) -> tuple[tuple[str, int], ...]:
    """What reads other tokens than its own, counted by kind and source line; a loop over layers does not."""
    found: Counter[str] = Counter()
    for frame in program.plan.frame.frames():
        for demand, node in frame.nodes.items():
            op = demand.value.op
            if op is None or op.name not in _MIXERS or not demand.wants_rows or demand.value.index:
                continue
            reads = [d for d in node.operands if program.plan.times.is_dependent(d.value)]
            others = any(r != s for d in reads for r in d.roles for s in demand.roles[:1])
            if op.name not in ("dot_general", "gather") or others:
                found[f"{_MIXERS[op.name]} ({op.source.short})"] += 1
        for loop in frame.loops.values():
            if loop.lead is not None:
                found[f"loops over tokens ({loop.op.source.short})"] += 1
    return tuple(sorted(found.items()))


def _lines(e: Explanation) -> list[str]:
    lines = [f"{e.num_params:,} parameters, derived for {e.capacity:,} tokens"]
    if e.refusal is not None:
        lines.append(f"refused: {e.refusal}")
    if e.layout is not None:
        lines += _cache_lines(e.layout)
        lines.append("mixes tokens by:" if e.mixing else "mixes no tokens")
        lines += [f"  {count} x {what}" for what, count in e.mixing]
    if e.flops is not None:
        decode, one_more, expansion = e.flops
        lines.append(f"a decode step at capacity: {decode:,} FLOPs (one more token in the forward: {one_more:,})")
        if expansion:
            lines.append(f"  of which {expansion:,} expand cached latents, until that is absorbed into the query")
    if e.certificate is not None:
        lines.append(
            f"certified: causal, and equal to the forward within {e.certificate.worst_error:.1e} of the largest logit"
        )
        if e.certificate.min_first_chunk > 1:
            lines.append(
                f"  a prompt needs at least {e.certificate.min_first_chunk} tokens: they read each other both ways"
            )
    elif e.refusal is None:
        lines.append(f"not certified: {e.not_certified}")
    return lines


def _cache_lines(layout: CacheLayout) -> list[str]:
    lines = [f"cached: {layout.bytes_per_token:,} bytes a token"]
    lines += _entry_lines([entry for entry in layout.entries if entry.kind == "kv"], "bytes a token")
    carried = [entry for entry in layout.entries if entry.kind != "kv"]
    if carried:
        lines.append(f"carried: {layout.bytes_per_request:,} bytes a request")
        lines += _entry_lines(carried, "bytes a request")
    return lines


def _entry_lines(entries: Sequence[CacheEntry], unit: str) -> list[str]:
    """A line for entries that are alike, in order of first appearance: layers of one class share a source line."""
    alike: dict[tuple[Any, ...], list[CacheEntry]] = {}
    for entry in entries:
        alike.setdefault((entry.kind, entry.dtype, entry.shape, entry.layers, entry.source), []).append(entry)
    return [_alike_line(group, unit) for group in alike.values()]


def _alike_line(alike: Sequence[CacheEntry], unit: str) -> str:
    first, num_layers = alike[0], len(alike) * alike[0].layers
    is_long = len(alike) > MAX_NAMES + 1
    names = ", ".join(entry.name for entry in (alike[:MAX_NAMES] if is_long else alike))
    if is_long:
        names += f", ... {alike[-1].name}"
    times, each = (f"{num_layers} x ", " each") if num_layers > 1 else ("", "")
    size = f"{first.nbytes // first.layers:,} {unit}{each}"
    return f"  {names}: {times}{first.dtype}{list(first.shape)}, {size} ({first.source})"
