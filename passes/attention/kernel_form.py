"""An attention in the words that kernels take: scale, soft-cap, a mask, a score function, and the leaves these read.

Knows no kernel. Matches: scores that `decompose` takes apart. Does not match: masks that may leave a query without any
key where the meaning then depends on how they were written. The one idea: whatever a kernel would have to be told at
run time becomes a leaf, made of the operation's own by an expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.attention.expression import Apply, Constant, Expression, Leaf, rewrite, walk
from passes.attention.predicates import roles_of
from passes.attention.simplify_mask import Decomposed, decompose, spread
from passes.masks import All, And, KeyLength, Mask, Offset, Or, Read, Shifted
from passes.scores import Biased, Score

UNIFORM_FILL = -1e20
"""Fills of this or less, added to scores of any size, leave nothing of them."""

Empty = Literal["never", "any", "mean"]


@dataclass(frozen=True)
class KernelForm:
    """What a kernel is told.

    Attributes:
      leaves: What the leaves of mask and score are, as expressions of the operation's leaves.
      empty: What a query that sees no key gives: there is none; anything, since the meaning is no number; or the mean
        of all values, since all its scores are one fill.
    """

    scale: float
    soft_cap: float | None
    mask: Mask
    score: Score | None
    leaves: tuple[Expression, ...]
    empty: Empty

    def make_leaves(self, sizes: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
        """The leaves, each with a leading batch axis.

        Args:
          sizes: B, T, N, S.
          leaves: Those of the operation, each `[B or 1, T or 1, N or 1, S or 1]`.
        """
        return [spread(expression, sizes, leaves) for expression in self.leaves]


class NoForm(Exception):
    """Why no kernel can be told of a score."""


def kernel_form(score: Expression, num_queries: int, num_keys: int, *, has_sinks: bool = False) -> KernelForm:
    """The form of a score.

    Raises:
      NoForm: There is none.
    """
    parts = decompose(score)
    if parts is None:
        raise NoForm("the scores are no scaled and capped product with a bias and a mask")
    mask, leaves = parts.mask, list(parts.leaves)
    if parts.query_start is not None:
        mask = Shifted(mask, len(leaves))
        leaves.append(cast_position(parts.query_start))
    bias = None if parts.bias is None else _biased(parts.bias, leaves)
    empty: Empty = "never"
    if not _sees_a_key(mask, leaves, num_queries, num_keys):
        empty = _of_nothing(parts, score, has_sinks)
    return KernelForm(parts.scale, parts.soft_cap, mask, bias, tuple(leaves), empty)


def cast_position(expression: Expression) -> Expression:
    """A position as the 32 bits that kernels count in."""
    params = (("new_dtype", np.dtype("int32")), ("sharding", None), ("weak_type", False))
    return Apply(lax.convert_element_type_p, params, (expression,))


_WAYS: dict[frozenset[str], Any] = {
    frozenset(): "request",
    frozenset("t"): "query",
    frozenset("s"): "key",
    frozenset("n"): "head",
    frozenset("ts"): "block",
    frozenset("ns"): "head_key",
    frozenset("tns"): "head_pair",
}


def _biased(bias: Expression, leaves: list[Expression]) -> Biased:
    reads: list[Read] = []
    places: dict[Expression, Expression] = {}
    for node in walk(bias):
        if isinstance(node, Constant) and float(node.value) == -np.inf:
            raise NoForm("the mask is a rule of heads, which per_head divides, or of requests, and none of positions")
        if not isinstance(node, Leaf):
            continue
        way = _WAYS.get(frozenset(node.roles) - {"b"})
        if way is None:
            raise NoForm(f"the bias has an array along {', '.join(node.roles)}")
        places[node] = Leaf(len(reads), node.roles, node.dtype)
        reads.append(Read(len(leaves), way))
        leaves.append(node)
    if "b" in roles_of(rewrite(bias, lambda node: Constant(0, node.dtype) if isinstance(node, Leaf) else None)):
        raise NoForm("the bias counts requests")
    return Biased(rewrite(bias, lambda node: places.get(node)), tuple(reads))


def _sees_a_key(mask: Mask, leaves: Sequence[Expression], num_queries: int, num_keys: int) -> bool:
    """Whether every query is known to see a key; numbers of requests are taken to be at least 0."""
    if isinstance(mask, Or):
        return any(_sees_a_key(term, leaves, num_queries, num_keys) for term in mask.terms)
    if isinstance(mask, KeyLength):
        return _is_positive(leaves[mask.leaf])
    is_shifted = isinstance(mask, Shifted)
    inner = mask.mask if isinstance(mask, Shifted) else mask
    if isinstance(inner, Offset):
        has_before = inner.lo is None or inner.lo <= 0
        has_after = inner.hi is None or (inner.hi >= 0 and not is_shifted and num_queries <= num_keys)
        return has_before and has_after
    if isinstance(inner, And):
        return not is_shifted and num_queries <= num_keys and sees_itself(inner)
    return isinstance(inner, All)


def sees_itself(mask: Mask) -> bool:
    """Whether every query is known to see the key at its own position."""
    if isinstance(mask, And):
        return all(map(sees_itself, mask.terms))
    if isinstance(mask, Or):
        return any(map(sees_itself, mask.terms))
    if isinstance(mask, Offset):
        return (mask.lo is None or mask.lo <= 0) and (mask.hi is None or mask.hi >= 0)
    return isinstance(mask, All)


def _is_positive(expression: Expression) -> bool:
    """Whether an expression is a number of a request and a positive constant."""
    if not isinstance(expression, Apply) or expression.name != "add":
        return False
    known = [float(node.value) for node in expression.operands if isinstance(node, Constant)]
    return len(known) == 1 and known[0] > 0


def _of_nothing(parts: Decomposed, score: Expression, has_sinks: bool) -> Empty:
    """What a query without keys gives."""
    fills = set(parts.fills)
    if has_sinks or fills == {-np.inf}:
        return "any"
    is_selected = isinstance(score, Apply) and score.name == "select_n"
    if len(parts.fills) == 1 and (is_selected or parts.fills[0] <= UNIFORM_FILL):
        return "mean"
    raise NoForm("a query may see no key, and what it then gives depends on how the mask is written")


def fill_empty(form: KernelForm, out: Any, lse: Any, value: Any) -> Any:
    """A kernel's output `[B, T, N, E]` with what queries without keys give.

    Args:
      lse: `[B, N, T]`, -inf for these.
      value: `[B, S, K, E]`.
    """
    if form.empty != "mean":
        return out
    is_empty = (lse == -jnp.inf).transpose(0, 2, 1)[..., None]

    def filled(out: Any) -> Any:
        mean = value.astype(jnp.float32).mean(axis=1)
        mean = jnp.repeat(mean, out.shape[2] // mean.shape[1], axis=1)[:, None]
        return jnp.where(is_empty, mean.astype(out.dtype), out)

    return lax.cond(is_empty.any(), filled, lambda out: out, out)
