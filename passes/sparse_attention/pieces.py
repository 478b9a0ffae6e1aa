"""An attention taken apart by heads: pieces that each have a mask of their own, with the KV heads that they read.

Masks may be asked for, and laid over those that there are, or be the program's own. The one idea: heads in a row with
one mask are one operation, and a rule of heads is decided before it is asked which keys a query sees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from passes.attention.expression import Constant, Expression, walk
from passes.attention.head_rules import scores_by_head
from passes.attention.simplify_mask import Decomposed
from passes.graph import Value
from passes.masks import Mask
from passes.numerics import Numerics
from passes.ops.attention import attention as attend
from passes.ops.attention import scores_of
from passes.reader import trace
from passes.replacement import replace
from passes.rewrite import Rewrite
from passes.sparse_attention.expressions import lay_over, of_heads, score_dtype
from passes.sparse_attention.layers import AttentionLayers
from passes.sparse_attention.query_positions import decompose_at, fold_starts


@dataclass(frozen=True)
class Piece:
    """Heads from `first` to before `end`, which read KV heads from `kv_first` to before `kv_end`.

    Attributes:
      asked: The mask that is laid over the program's own.
      score: The program's own, rules of heads decided; what else knows the head counts from 0.
      form: That taken apart.
    """

    first: int
    end: int
    kv_first: int
    kv_end: int
    asked: Mask
    score: Expression
    form: Decomposed

    @property
    def mask(self) -> Mask:
        """What is asked and the program's own."""
        return self.asked & self.form.mask

    @property
    def is_narrower(self) -> bool:
        """Whether what is asked hides anything more."""
        return self.mask != self.form.mask


@dataclass(frozen=True, eq=False)
class Site:
    """An attention and its pieces."""

    item: AttentionLayers
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, item: AttentionLayers, masks: Sequence[Mask]) -> Site | str:
        """The site, or why it stays as it is.

        Args:
          masks: Asked for, of each head.
        """
        scores = scores_by_head(item.op)
        if scores is None:
            return "which keys a head sees is a rule of heads that is known only when it runs"
        forms = {score: decompose_at(item.op, score) for score in scores}
        if any(form is None for form in forms.values()):
            return "its scores are no product with a mask over it, so positions of queries are not known"
        known = {score: form for score, form in forms.items() if form is not None}
        if any(map(_is_hiding_by_bias, known.values())):
            return "its mask is a rule of requests, so positions of queries are not known"
        runs = split_heads(list(zip(masks, scores, strict=True)), item.num_heads // item.op.operands[1].shape[2])
        return cls(item, tuple(Piece(*run, masks[run[0]], scores[run[0]], known[scores[run[0]]]) for run in runs))

    @property
    def operands(self) -> list[Value]:
        """What the operation takes and is no constant, each once."""
        return list(dict.fromkeys(v for v in self.item.op.operands if v.const is None))

    def bound(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn(query, key, value, leaves, sinks)` as a function of `operands`."""
        values, num_leaves = self.item.op.operands, self.item.op.params["num_leaves"]

        def run(*arrays: Any) -> Any:
            known = dict(zip(self.operands, arrays, strict=True))
            query, key, value, *rest = (jnp.asarray(known[v] if v.const is None else v.const) for v in values)
            return fn(query, key, value, rest[:num_leaves], rest[num_leaves] if len(rest) > num_leaves else None)

        return run

    def standing(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of `operands` at positions that the keys have."""

        def run(*arrays: Any) -> Any:
            for form in dict.fromkeys(piece.form for piece in self.pieces):
                arrays = tuple(fold_starts(self.item.op, form, self.operands, arrays))
            return fn(*arrays)

        return run

    def attend(self, query: Any, key: Any, value: Any, leaves: Sequence[Any], sinks: Any | None) -> Any:
        """The operation in pieces, each with its mask."""
        params = {name: x for name, x in self.item.op.params.items() if name not in ("score", "num_leaves")}

        def cut(x: Any, piece: Piece) -> Any:
            return x if x.shape[2] == 1 else x[:, :, piece.first : piece.end]

        parts = []
        for piece in self.pieces:
            kv_heads = slice(piece.kv_first, piece.kv_end)
            parts.append(
                attend(
                    query[:, :, piece.first : piece.end],
                    key[:, :, kv_heads],
                    value[:, :, kv_heads],
                    [cut(x, piece) for x in leaves],
                    None if sinks is None else cut(sinks, piece),
                    score=self._score(piece, [x.dtype for x in leaves]),
                    **params,
                )
            )
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)

    def _score(self, piece: Piece, leaf_dtypes: Sequence[Any]) -> Expression:
        score = piece.score
        if piece.is_narrower:
            dtype = score_dtype(score, self.item.op.params["core_dtype"], leaf_dtypes)
            score = lay_over(score, dtype, piece.asked, piece.form.query_start)
        return of_heads(score, piece.first)

    def reference(self, query: Any, key: Any, value: Any, leaves: Sequence[Any], sinks: Any | None) -> Any:
        """The operation whole, with the masks written out for every head: what the pieces must compute."""
        params = self.item.op.params
        scores = scores_of(query, key, leaves, params["score"], params["core_dtype"])
        B, T, N, S = scores.shape
        keys, seen = jnp.arange(S)[None, None], []
        for piece in self.pieces:
            position = (piece.form.starts(scores.shape, leaves)[:, None] + jnp.arange(T))[..., None]
            seen.append(jnp.broadcast_to(piece.asked.contains(position, keys), (B, T, S)))
        sizes = [p.end - p.first for p in self.pieces]
        by_head = jnp.concatenate([jnp.stack([s] * n, axis=2) for s, n in zip(seen, sizes, strict=True)], axis=2)
        scores = jnp.where(by_head, scores, -jnp.inf)
        if sinks is not None:
            column = jnp.broadcast_to(sinks[..., None], (B, T, N, 1)).astype(scores.dtype)
            scores = jnp.concatenate([scores, column], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :S].astype(params["weight_dtype"])
        values = jnp.repeat(value.astype(weights.dtype), N // value.shape[2], axis=2)
        out = jnp.einsum("btns,bsne->btne", weights, values, preferred_element_type=params["out_dtype"])
        return out.astype(params["out_dtype"])


def _is_hiding_by_bias(form: Decomposed) -> bool:
    parts = () if form.bias is None else walk(form.bias)
    return any(isinstance(node, Constant) and node.value == -np.inf for node in parts)


def split_heads(masks: Sequence[Hashable], group: int) -> list[tuple[int, int, int, int]]:
    """Ranges of heads with one mask, each with its range of KV heads, so that all of them have as many queries.

    Args:
      masks: Of each query head.
      group: Query heads of a KV head.
    """
    runs: list[tuple[int, int]] = []
    for head, mask in enumerate(masks):
        if runs and masks[runs[-1][0]] == mask:
            runs[-1] = runs[-1][0], head + 1
        else:
            runs.append((head, head + 1))
    parts: list[tuple[int, int]] = []
    for first, end in runs:
        if (end - 1) // group == first // group:  # within one KV head
            parts.append((first, end))
            continue
        up, down = -(-first // group) * group, end // group * group
        parts += [(a, b) for a, b in ((first, up), (up, down), (down, end)) if a < b]
    return [(first, end, first // group, -(-end // group)) for first, end in parts]


def divide(name: str, site: Site) -> Rewrite:
    """Puts the pieces in the place of the operation; the rewrite is validated where requests can stand."""
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in site.operands]
    before, after = (trace(site.standing(site.bound(fn)), *shapes)[0] for fn in (site.reference, site.attend))
    body, _ = trace(site.bound(site.attend), *shapes)
    op = site.item.op
    for _, made in body.walk():
        made.source = op.source
    replace(site.item.graph, body, site.operands, op.result)
    return Rewrite(name, Numerics.REASSOCIATES, before, after, op.source)
