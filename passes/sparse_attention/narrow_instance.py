"""One attention with reads made narrow, by itself, before and after, to be validated on random numbers.

That rows left out had weight 0 is true where requests stand: at positions that a cache has, with a key for every query
to see. The one idea: what must hold is computed in both graphs alike, so that any numbers will do as arguments. Where a
request begins is folded into what the cache holds, and a query that sees no key gives 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from passes.attention.simplify_mask import Decomposed
from passes.extract import extract_between
from passes.graph import Graph, Op, Value
from passes.ops.kv_update_read import kv_update_read, split_operands
from passes.reader import trace
from passes.replay import evaluate
from passes.sparse_attention.query_positions import fold_starts
from passes.sparse_attention.support import Support


@dataclass(frozen=True, eq=False)
class Standing:
    """Where the requests of an attention may stand.

    Attributes:
      op: The attention as it was.
      operands: What both graphs take.
    """

    op: Op
    form: Decomposed
    support: Support
    operands: Sequence[Value]

    def inside(self, arrays: Sequence[Any]) -> list[Any]:
        """The operands with the number that requests begin at folded into the positions that there are."""
        first = self.support.band[0] if self.support.band is not None else 0
        return fold_starts(self.op, self.form, self.operands, arrays, first)

    def only_seeing(self, out: Any, arrays: Sequence[Any]) -> Any:
        """The result `[B, T, N, E]` with 0 for queries that see no key."""
        known = dict(zip(self.operands, arrays, strict=True))
        num_leaves = self.op.params["num_leaves"]
        leaves = [jnp.asarray(known[v] if v.const is None else v.const) for v in self.op.operands[3 : 3 + num_leaves]]
        B, T, N, _ = self.op.operands[0].shape
        S = self.op.operands[1].shape[1]
        starts, of_mask = self.form.starts((B, T, N, S), leaves), self.form.mask_leaves((B, T, N, S), leaves)

        def seeing(start: Any, *leaves: Any) -> Any:
            q = start + jnp.arange(T, dtype=jnp.int32)
            seen = self.form.mask.contains(q[:, None], jnp.arange(S, dtype=jnp.int32)[None], leaves)
            return jnp.broadcast_to(seen, (T, S)).any(axis=1)

        is_seeing = jax.vmap(seeing)(starts, *of_mask)
        return jnp.where(is_seeing[:, :, None, None], out, jnp.zeros((), out.dtype))


def make_instance(standing: Standing, caches: Sequence[Op], narrow: Callable[..., Any]) -> tuple[Graph, Graph]:
    """The attention over all rows of the caches, and `narrow`, as graphs of `standing.operands`.

    Args:
      caches: What writes each cache and reads all of it; the operands hold what it leaves of the pool.
    """
    operands, op = list(standing.operands), standing.op
    rest = extract_between([*operands, *(cache.results[0] for cache in caches)], [op.result])

    def wide(*arrays: Any) -> Any:
        known = dict(zip(operands, arrays, strict=True))
        views = [_read_all(cache, lambda v: known[v] if v.const is None else jnp.asarray(v.const)) for cache in caches]
        return evaluate(rest, [*arrays, *views])[0]

    def standing_inside(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arrays: Any) -> Any:
            inside = standing.inside(arrays)
            return standing.only_seeing(fn(*inside), inside)

        return run

    types = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in operands]
    before, after = (trace(standing_inside(fn), *types)[0] for fn in (wide, narrow))
    return before, after


def _read_all(cache: Op, get: Callable[[Value], Any]) -> Any:
    """All rows of a cache that has been written."""
    _, layers = split_operands(cache.operands, cache.params["length"])
    rows, positions = cache.operands[1], cache.operands[2]
    view, _ = kv_update_read(
        get(cache.results[1]),
        [get(layer) for layer in layers],
        jnp.zeros((rows.shape[0], 0, *rows.shape[2:]), rows.dtype),
        jnp.zeros((positions.shape[0], 0), positions.dtype),
        get(cache.operands[3]),
        length=cache.params["length"],
    )
    return view
