"""The pass `sparse_attention`: lays the masks that `--sparse` asks for over attention, layer by layer, head by head.

Matches: the operation `attention`, in the program and in the bodies of loops, whose scores come apart into a product
and a mask. Heads with different masks become operations of their own, each with the KV heads that it reads; a KV head
whose queries differ is read once for each of them. Does not match: scores whose mask cannot be told apart, since the
positions of queries are taken from it; loops over layers in which clauses tell layers apart.
Must run after: `attention`, and once: what it splits counts as more layers. Numerics: lossy.

The mask alone saves nothing: `narrow_reads` and kernels that walk block lists leave out what it hides.
"""

from __future__ import annotations

from collections.abc import Sequence

from passes.dce import dce
from passes.graph import Graph
from passes.result import PassResult, Remark
from passes.rewrite import RewriteCounter
from passes.sparse_attention.density import blind_query, find_density, without_leaves
from passes.sparse_attention.language import Choice, Rule, Sparsity, SparsityError
from passes.sparse_attention.layers import AttentionLayers, find_layers, numbers_text
from passes.sparse_attention.pieces import Site, divide


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
        site = Site.of(item, [rule.mask(limit) for rule in rules])
        if isinstance(site, str):
            result += PassResult(remarks=(Remark.at(item.op, f"{item.layer_text}: {site}"),))
            continue
        if not any(piece.is_narrower for piece in site.pieces):
            continue
        if counter is not None and not counter.allows("sparse_attention", item.op.source):
            break
        for line in _describe(site, rules, limit):
            said.setdefault(line, []).append(item)
        result += PassResult(1, rewrites=(divide("sparse_attention", site),))
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


# ------------------------------------------------------------------------------------------------- what is said
def _describe(site: Site, rules: Sequence[Rule], length: int) -> list[str]:
    """What becomes of the heads, a line for each range of them.

    Raises:
      SparsityError: A query sees no key any more.
    """
    lines = []
    num_heads = site.item.num_heads
    for piece in site.pieces:
        mask, base = without_leaves(piece.mask), without_leaves(piece.form.mask)
        blind = blind_query(mask, length)
        rule = rules[piece.first]
        if blind is not None and blind_query(base, length) is None:
            raise SparsityError(
                f"{site.item.layer_text}: {rule} leaves the query at position {blind} no key; add sinks(n) or window(n)"
            )
        if not piece.is_narrower:
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
