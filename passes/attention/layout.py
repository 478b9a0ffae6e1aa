"""Which axis of an attention is batch, query, head or key, and how its operands are laid out by that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from passes.attention.expression import Expression, Index, Role, walk
from passes.attention.lift import Roles
from passes.attention.predicates import linear, roles_of
from passes.attention.recognize import Attention, NoMatch, Product
from passes.attention.simplify_mask import decompose
from passes.axes import Axes, Axis, View, size_of
from passes.masks import And, KeyLength, Mask, Not, Or


@dataclass(frozen=True)
class Layout:
    """The axes of an attention by meaning; each a product, outermost first.

    Attributes:
      kv_heads, groups: Together the query heads, KV heads outermost.
      widths: What queries meet keys along, one for each product in the scores.
      value_width: What the result has of the values.
    """

    axes: Axes
    batch: tuple[Axis, ...]
    queries: tuple[Axis, ...]
    kv_heads: tuple[Axis, ...]
    groups: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    widths: tuple[tuple[Axis, ...], ...]
    value_width: tuple[Axis, ...]

    @property
    def heads(self) -> tuple[Axis, ...]:
        return (*self.kv_heads, *self.groups)

    def roles(self) -> Roles:
        """The roles of the scores' axes."""
        of: dict[Role, tuple[Axis, ...]] = {"b": self.batch, "t": self.queries, "n": self.heads, "s": self.keys}
        return Roles(self.axes, of)


def find_layout(
    found: Attention,
    products: Sequence[Product],
    values: View,
    masked: Sequence[Axis],
    *,
    is_one_position: bool = False,
    has_head_rule: bool = False,
) -> Layout:
    """Divides the axes among the roles.

    Args:
      products: Those whose sum enters the scores.
      values: What the weights meet.
      masked: Axes that masks vary along beside the keys': one of them tells queries from heads that share keys.
      is_one_position: Whether no axis counts queries, so that all that queries alone have are heads.
      has_head_rule: Whether masks compute with the index of what would be a request, so that it is a head.

    Raises:
      NoMatch: An axis fits no role, so that this is no attention.
    """
    axes, keys, op = found.axes, found.axes.expand(found.summed), products[0].op
    operands = [view for p in products for view in (p.first, p.second)]
    for dims in (found.dims, *(view.dims for view in (*operands, values, found.score))):
        if len(set(axes.flat(dims))) != len(axes.flat(dims)):
            raise NoMatch("two axes of one value would have to be the same", op, near=True)
    widths = tuple(axes.expand(product.contracted) for product in products)
    width = {axis for axes_of in widths for axis in axes_of}
    query = _own(axes, [p.first for p in products], width)
    key = _own(axes, [p.second for p in products], {*width, *keys})
    value, result = axes.flat(values.dims), axes.flat(found.dims)
    if set(keys) & (set(query) | width):
        raise NoMatch("queries have the axes of the keys", op, near=True)
    if not set(keys) <= set(value):
        raise NoMatch("the values lack an axis of the softmax", op, near=True)
    if set(key) - set(query):
        raise NoMatch("keys have an axis that queries lack and the softmax does not run along", op, near=True)
    value_width = tuple(a for a in value if a not in keys and a not in query)
    if set(result) != {*query, *value_width}:
        raise NoMatch("the result has other axes than queries and values", op, near=True)
    shared = sorted((a for a in query if a in key or a in value), key=result.index)
    free = sorted((a for a in query if a not in shared), key=result.index)
    queries = () if is_one_position else _queries(free, masked, size_of(keys))
    groups = tuple(a for a in free if a not in queries)
    known = () if has_head_rule else masked
    batch, kv_heads = _requests_and_heads(shared, known, has_groups=bool(groups))
    return Layout(axes, batch, queries, kv_heads, groups, keys, widths, value_width)


def is_at_one_position(score: Expression) -> bool:
    """Whether queries stand at one position, which the scores know as a number of the request.

    In a step of one token `k <= start` bounds the keys, and no axis of the queries enters the mask: what was taken for
    one counts heads that share keys. A bound of the very number that is given is the length of a padded sequence,
    whose queries may stand anywhere.
    """
    if "t" in roles_of(score):
        return False
    form = decompose(score)
    bounds = () if form is None else (linear(form.leaves[n]) for n in length_leaves(form.mask))
    return any(bound is not None and bound.const != 0 for bound in bounds)


def counts_requests(score: Expression) -> bool:
    """Whether scores compute with the number of a request, which no program has a reason to."""
    return any(isinstance(node, Index) and node.role == "b" for node in walk(score))


def length_leaves(mask: Mask) -> Iterator[int]:
    """The leaves that bound the keys of a request."""
    if isinstance(mask, KeyLength):
        yield mask.leaf
    for inner in mask.terms if isinstance(mask, And | Or) else (mask.mask,) if isinstance(mask, Not) else ():
        yield from length_leaves(inner)


def _requests_and_heads(
    shared: Sequence[Axis], masked: Sequence[Axis], *, has_groups: bool
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Of the axes that queries and keys share the last counts heads, unless masks know it and other heads are there."""
    if shared and shared[-1] in masked and (has_groups or len(shared) == 1):
        return tuple(shared), ()
    return tuple(shared[:-1]), tuple(shared[-1:])


def _own(axes: Axes, views: Sequence[View], besides: Collection[Axis]) -> list[Axis]:
    """The axes of some views, each once, without some others."""
    return list(dict.fromkeys(a for view in views for a in axes.flat(view.dims) if a not in besides))


def _queries(free: Sequence[Axis], masked: Sequence[Axis], num_keys: int) -> tuple[Axis, ...]:
    """Which of the axes that queries alone have is their position: the one masks know, else the one like the keys'."""
    if len(free) < 2:
        return tuple(free)
    known = [a for a in free if a in masked] or list(free)
    if len(known) == 1:
        return (known[0],)
    alike = [a for a in known if a.size == num_keys]
    return (alike[0] if alike else max(known, key=lambda a: a.size),)
