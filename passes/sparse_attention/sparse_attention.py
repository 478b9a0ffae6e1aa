"""The pass `sparse_attention`: lays the masks that `--sparse` asks for over attention, layer by layer, head by head.

Matches: the operation `attention`, in the program and in the bodies of loops, whose scores come apart into a product
and a mask. Heads with different masks become operations of their own, each with the KV heads that it reads; a KV head
whose queries differ is read once for each of them. Does not match: scores whose mask cannot be told apart, since the
positions of queries are taken from it; loops over layers in which clauses tell layers apart.
Must run after: `attention`, and once: what it splits counts as more layers. Numerics: lossy.

The mask alone saves nothing: `narrow_reads` and kernels that walk block lists leave out what it hides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from passes.attention.expression import Expression
from passes.attention.simplify_mask import Decomposed
from passes.dce import dce
from passes.graph import Graph, Value
from passes.masks import Mask
from passes.numerics import Numerics
from passes.ops.attention import attention as attend
from passes.ops.attention import scores_of
from passes.reader import trace
from passes.replacement import replace
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter
from passes.sparse_attention.density import blind_query, find_density, without_leaves
from passes.sparse_attention.expressions import lay_over, of_heads, score_dtype
from passes.sparse_attention.language import Choice, Rule, Sparsity, SparsityError
from passes.sparse_attention.layers import AttentionLayers, find_layers, numbers_text
from passes.sparse_attention.query_positions import decompose_at


def sparse_attention(
    graph: Graph,
    sparsity: Sparsity,
    counter: RewriteCounter | None = None,
    *,
    length: int | None = None,
    num_layers: int | None = None,
) -> PassResult:
    """Rewrites in place.

    Args:
      length: Longest sequence in tokens, at which densities are solved; by default the keys of each attention.
      num_layers: Layers of attention that there must be, so that their numbers are those that the user knows.

    Raises:
      SparsityError: The clauses do not fit the program.
    """
    found = find_layers(graph)
    if not found:
        return PassResult(remarks=_nothing_found(graph))
    total = sum(len(item.layers) for item in found)
    if num_layers is not None and total != num_layers:
        raise SparsityError(f"needs all {num_layers} layers of attention recognised in a step, and {total} are")
    choice = choose(found, sparsity)
    result, said = PassResult(), dict[str, list[AttentionLayers]]()
    for item in found:
        rules = choice.rules(item.layers[0])
        limit = min(length or item.op.operands[1].shape[1], item.op.operands[1].shape[1])
        site = _Site.of(item, [rule.mask(limit) for rule in rules])
        if isinstance(site, str):
            result += PassResult(remarks=(Remark.at(item.op, f"{item.layer_text}: {site}"),))
            continue
        if all(piece.mask == site.form.mask for piece in site.pieces):
            continue
        if counter is not None and not counter.allows("sparse_attention", item.op.source):
            break
        for line in _describe(site, rules, limit):
            said.setdefault(line, []).append(item)
        rewrite = _make_rewrite(site)
        replace(item.graph, rewrite, site.operands, item.op.result)
        result += PassResult(1, rewrites=(rewrite,))
    if result.matched:
        dce(graph)
    notes = [
        Remark.at(items[0].op, f"{numbers_text('layer', sorted(n for item in items for n in item.layers))}: {line}")
        for line, items in said.items()
    ]
    return result + PassResult(notes=tuple(notes))


def choose(found: Sequence[AttentionLayers], sparsity: Sparsity, *, is_unrolled: bool = False) -> Choice:
    """Which clause decides about each head of the layers of a program.

    Args:
      is_unrolled: Whether layers in a loop will be told apart all the same.

    Raises:
      SparsityError: The clauses do not fit.
    """
    num_heads = {layer: item.num_heads for item in found for layer in item.layers}
    choice = sparsity.choose([num_heads[layer] for layer in sorted(num_heads)])
    for item in () if is_unrolled else found:
        first = item.layers[0]
        other = next((layer for layer in item.layers if choice.rules(layer) != choice.rules(first)), None)
        if other is not None:
            raise SparsityError(
                f"tells layers {first} and {other} apart, and {item.layer_text} run in one loop "
                f"({item.op.source.short}); write the loop out (unroll_layers) or name all its layers in a clause"
            )
    return choice


def _nothing_found(graph: Graph) -> tuple[Remark, ...]:
    return tuple(Remark.at(op, "no attention was recognised, so none is made sparse") for op in graph.ops[:1])


# ------------------------------------------------------------------------------------------------- one operation
@dataclass(frozen=True)
class _Piece:
    """Heads from `first` to before `end`, which read KV heads from `kv_first` to before `kv_end`.

    Attributes:
      asked: The mask of the clause.
      mask: That and the program's own.
    """

    first: int
    end: int
    kv_first: int
    kv_end: int
    asked: Mask
    mask: Mask


@dataclass(frozen=True, eq=False)
class _Site:
    item: AttentionLayers
    form: Decomposed
    pieces: tuple[_Piece, ...]

    @classmethod
    def of(cls, item: AttentionLayers, masks: Sequence[Mask]) -> _Site | str:
        """The site, or why it stays as it is."""
        form = decompose_at(item.op)
        if form is None:
            return "its scores are no product with a mask over it, so positions of queries are not known"
        runs = split_heads(masks, item.num_heads // item.op.operands[1].shape[2])
        return cls(item, form, tuple(_Piece(*run, masks[run[0]], masks[run[0]] & form.mask) for run in runs))

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

    def attend(self, query: Any, key: Any, value: Any, leaves: Sequence[Any], sinks: Any | None) -> Any:
        """The operation in pieces, each with its mask."""
        score = self.item.op.params["score"]
        params = {name: x for name, x in self.item.op.params.items() if name not in ("score", "num_leaves")}

        def cut(x: Any, piece: _Piece) -> Any:
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
                    score=self._score(score, piece, [x.dtype for x in leaves]),
                    **params,
                )
            )
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)

    def _score(self, score: Expression, piece: _Piece, leaf_dtypes: Sequence[Any]) -> Expression:
        if piece.mask != self.form.mask:
            dtype = score_dtype(score, self.item.op.params["core_dtype"], leaf_dtypes)
            score = lay_over(score, dtype, piece.asked, self.form.query_start)
        return of_heads(score, piece.first)

    def reference(self, query: Any, key: Any, value: Any, leaves: Sequence[Any], sinks: Any | None) -> Any:
        """The operation whole, with the masks written out for every head: what the pieces must compute."""
        params = self.item.op.params
        scores = scores_of(query, key, leaves, params["score"], params["core_dtype"])
        B, T, N, S = scores.shape
        position = (self.form.starts(scores.shape, leaves)[:, None] + jnp.arange(T))[..., None]
        keys = jnp.arange(S)[None, None]
        seen = [jnp.broadcast_to(p.asked.contains(position, keys), (B, T, S)) for p in self.pieces]
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


def _make_rewrite(site: _Site) -> Rewrite:
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in site.operands]
    before, after = (trace(site.bound(fn), *shapes)[0] for fn in (site.reference, site.attend))
    source = site.item.op.source
    for _, op in after.walk():
        op.source = source
    return Rewrite("sparse_attention", Numerics.REASSOCIATES, before, after, source)


# ------------------------------------------------------------------------------------------------- what is said
def _describe(site: _Site, rules: Sequence[Rule], length: int) -> list[str]:
    """What becomes of the heads, a line for each range of them.

    Raises:
      SparsityError: A query sees no key any more.
    """
    lines = []
    base = without_leaves(site.form.mask)
    num_heads = site.item.num_heads
    for piece in site.pieces:
        mask = without_leaves(piece.mask)
        blind = blind_query(mask, length)
        rule = rules[piece.first]
        if blind is not None and blind_query(base, length) is None:
            raise SparsityError(
                f"{site.item.layer_text}: {rule} leaves the query at position {blind} no key; add sinks(n) or window(n)"
            )
        if piece.mask == site.form.mask:
            continue
        is_all = piece.end - piece.first == num_heads
        heads = "" if is_all else f"{numbers_text('head', range(piece.first, piece.end))}: "
        lines.append(f"{heads}{rule} holds {find_density(mask, base, length)} over {length} tokens")
    read = [kv for piece in site.pieces for kv in range(piece.kv_first, piece.kv_end)]
    shared = sorted({kv for kv in read if read.count(kv) > 1})
    if shared:
        more = len(read) - len(set(read))
        named = numbers_text("KV head", shared)
        lines.append(f"query heads of {named} differ, so that keys and values of {more} more KV heads are read")
    return lines
