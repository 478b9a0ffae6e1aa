"""Where the queries of an attention stand, so that rules about distances can be laid over it and read from it.

Where a step has several queries their index is compared with that of the keys, and the mask says what is added to it.
Where it has one there is no index: `k <= start` compares the keys with a number of the request. The one idea: there too
the number is a position, and the comparison is one of distances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import lax

from passes.attention.expression import Apply, Constant, Expression, Leaf
from passes.attention.layout import length_leaves
from passes.attention.predicates import linear
from passes.attention.simplify_mask import Decomposed, decompose
from passes.graph import Op, Value
from passes.masks import And, KeyLength, Mask, Not, Offset, Or, all_of, any_of

_Terms = tuple[tuple[Expression, int], ...]


def decompose_at(op: Op, score: Expression | None = None) -> Decomposed | None:
    """The scores of an attention taken apart; of one position with it as `query_start`, where one number can be it.

    Args:
      score: In place of its own.
    """
    form = decompose(op.params["score"] if score is None else score)
    if form is None or op.operands[0].shape[1] > 1:
        return form
    lengths = {leaf: linear(form.leaves[leaf]) for leaf in length_leaves(form.mask)}
    terms: dict[int, tuple[_Terms, int]] = {n: (x.rest, x.const) for n, x in lengths.items() if x is not None}
    if form.query_start is not None:
        start = linear(form.query_start)
        rests = set() if start is None else {start.rest}
    else:
        rests = {rest for rest, _ in terms.values()}
    if len(rests) != 1:
        return form
    (rest,) = rests
    offsets = {n: 1 - const for n, (other, const) in terms.items() if other == rest}
    return dataclasses.replace(form, mask=_moved(form.mask, offsets), query_start=_sum(rest))


def fold_starts(
    op: Op, form: Decomposed, operands: Sequence[Value], arrays: Sequence[Any], first: int = 0
) -> list[Any]:
    """Arguments of an attention with the number that its requests begin at folded into the positions that there are.

    Args:
      operands: What the arrays are.
      first: The first position that a query may stand at.
    """
    start = form.query_start
    while isinstance(start, Apply) and start.name == "convert_element_type":
        (start,) = start.operands
    if not isinstance(start, Leaf):
        return list(arrays)
    value, num_places = op.operands[3 + start.number], op.operands[1].shape[1] - op.operands[0].shape[1] + 1
    return [x % num_places + first if v is value else x for v, x in zip(operands, arrays, strict=True)]


def _moved(mask: Mask, offsets: dict[int, int]) -> Mask:
    """`k < position + 1 - lo` as `position - k >= lo`."""
    if isinstance(mask, KeyLength) and mask.leaf in offsets:
        return Offset(offsets[mask.leaf], None)
    if isinstance(mask, And | Or):
        join = all_of if isinstance(mask, And) else any_of
        return join(_moved(term, offsets) for term in mask.terms)
    return ~_moved(mask.mask, offsets) if isinstance(mask, Not) else mask


def _sum(terms: _Terms) -> Expression:
    out: Expression = Constant(0, "int32")
    for number, (term, factor) in enumerate(terms):
        part = term if factor == 1 else Apply(lax.mul_p, (), (term, Constant(factor, "int32")))
        out = part if number == 0 else Apply(lax.add_p, (), (out, part))
    return out
