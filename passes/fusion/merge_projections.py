"""The pass `merge_projections`: products of one activation with several weights become one product.

Matches: `dot_general`s of the same value along the same axes whose other operands are made of parameters and constants
alone, such as queries, keys and values, or gate and up; widths may differ and either operand may be the weight. The
weights are joined where `passes.binding_time` makes them: once, ahead of every step. Biases stay behind the product.
Does not match: weights that are read elsewhere too, which would be kept twice; weights in a loop over layers, which
would be joined in every step; a sibling far narrower than the widest, such as a router; weights on a mesh, unless told
how each is cut. Where devices share the columns of all, these are put in the order of devices, so that each joins its
own and nothing is exchanged.
Must run after: `simplify`, and after whatever looks for single projections. Numerics: reassociates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from passes.fusion.direct import Site, rewrite_sites
from passes.graph import Graph, Op, Value
from passes.numerics import Numerics
from passes.result import PassResult, Remark
from passes.rewrite import RewriteCounter

NARROW = 64
"""A sibling this many times narrower than the widest stays alone."""
_PLACEMENT = frozenset({"sharding_constraint", "shard_map"})


CutOf = Callable[[str, tuple[int, ...]], int | None]
"""Path and shape of a parameter -> the dimension that devices share, None for one that each holds whole."""


@dataclass(frozen=True, eq=False)
class _Projection:
    """A product of an activation with a weight.

    Attributes:
      side: Which operand is the weight.
    """

    op: Op
    side: int

    @property
    def activation(self) -> Value:
        return self.op.operands[1 - self.side]

    @property
    def weight(self) -> Value:
        return self.op.operands[self.side]

    @property
    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The contracted dimensions of activation and weight, in the order of the activation's."""
        pairs = self.op.params["dimension_numbers"][0]
        order = sorted(zip(pairs[1 - self.side], pairs[self.side], strict=True))
        return tuple(int(a) for a, _ in order), tuple(int(w) for _, w in order)

    @property
    def free(self) -> tuple[int, ...]:
        """The dimensions of the weight that reach the result."""
        return tuple(i for i in range(len(self.weight.shape)) if i not in self.contracted[1])

    @property
    def width(self) -> int:
        return math.prod(self.weight.shape[i] for i in self.free)

    @property
    def likeness(self) -> Any:
        """Equal for those that can be one product; into how many dimensions a weight lays its columns is no matter."""
        p = self.op.params
        kinds = (self.weight.dtype, str(p["precision"]), self.op.result.dtype)
        return self.activation, self.contracted[0], kinds, str(p["preferred_element_type"])


def merge_projections(
    graph: Graph,
    counter: RewriteCounter | None = None,
    *,
    num_shards: int | None = None,
    cut_of: CutOf | None = None,
) -> PassResult:
    """Rewrites in place.

    Args:
      num_shards: Devices that share weights; None for one, unless the program says where values lie.
      cut_of: How they share each; without it nothing is joined on several devices.
    """
    find = functools.partial(_find, graph, num_shards, cut_of)
    return rewrite_sites(graph, "merge_projections", Numerics.REASSOCIATES, find, counter)


def _find(program: Graph, num_shards: int | None, cut_of: CutOf | None, graph: Graph) -> list[Site | Remark]:
    static = _static(graph) if graph is program else set[Value]()
    if graph is not program:
        return []
    users = graph.users()
    is_placed = num_shards is None and any(op.name in _PLACEMENT for op in graph.ops)
    groups: dict[Any, list[_Projection]] = {}
    for op in graph.ops:
        projection = _projection(op, static)
        if projection is not None:
            groups.setdefault(projection.likeness, []).append(projection)
    found: list[Site | Remark] = []
    for group in groups.values():
        widest = max(p.width for p in group)
        siblings = [p for p in group if p.width * NARROW > widest]
        if len(siblings) < 2:
            continue
        reason = _objection(siblings, users, graph, num_shards or 1, cut_of, is_placed)
        if reason is not None:
            found.append(Remark.at(siblings[0].op, f"merge_projections: {reason}"))
        else:
            is_cut = (num_shards or 1) > 1 and cut_of is not None and _cut(siblings[0].weight, cut_of) is not None
            found.append(_site(siblings, num_shards or 1 if is_cut else 1))
    return found


def _static(graph: Graph) -> set[Value]:
    """Values that parameters and constants alone determine."""
    static = {v for v in graph.inputs if v.path is not None}
    for op in graph.ops:
        is_known = all(v in static or v.const is not None for v in op.operands)
        if is_known and not op.effects and any(v in static for v in op.operands):
            static.update(op.results)
    return static


def _projection(op: Op, static: set[Value]) -> _Projection | None:
    if op.name != "dot_general" or op.params["dimension_numbers"][1][0]:
        return None
    sides = [i for i, v in enumerate(op.operands) if v in static]
    if len(sides) != 1 or op.operands[1 - sides[0]].const is not None:
        return None
    projection = _Projection(op, sides[0])
    return projection if projection.free else None


def _objection(
    siblings: Sequence[_Projection],
    users: dict[Value, list[Op]],
    graph: Graph,
    num_shards: int,
    cut_of: CutOf | None,
    is_placed: bool,
) -> str | None:
    outputs = set(graph.outputs)
    if any(_is_shared(p.weight, users, outputs) for p in siblings):
        return "a weight is read elsewhere too, and would be kept twice"
    if is_placed:
        return "the program is placed on several devices, and the columns of a joined weight would lie apart"
    if num_shards > 1 and cut_of is None:
        return f"columns are shared by {num_shards} devices, and those of a joined weight would lie apart"
    if num_shards > 1 and cut_of is not None:
        return _cut_objection(siblings, num_shards, cut_of)
    return None


def _cut_objection(siblings: Sequence[_Projection], num_shards: int, cut_of: CutOf) -> str | None:
    try:
        cuts = [_cut(p.weight, cut_of) for p in siblings]
    except _Unclear as error:
        return f"{num_shards} devices share a weight, and {error}"
    if all(cut is None for cut in cuts):
        return None
    wide = [next((d for d in p.free if p.weight.shape[d] > 1), None) for p in siblings]
    if cuts != wide:
        return f"{num_shards} devices share the weights otherwise than by their outermost columns"
    if any(p.weight.shape[cut] % num_shards for p, cut in zip(siblings, cuts, strict=True) if cut is not None):
        return f"a width is no multiple of {num_shards} devices"
    return None


class _Unclear(Exception):
    """Why it is not known how devices share a value."""


def _cut(weight: Value, cut_of: CutOf) -> int | None:
    """The dimension of a weight that devices share; None where each holds it whole.

    Raises:
      _Unclear: What it is made of does not tell.
    """
    views: list[Op] = []
    while weight.op is not None and weight.op.name in ("transpose", "convert_element_type", "reshape", "squeeze"):
        views.append(weight.op)
        weight = weight.op.operands[0]
    if weight.path is None:
        if weight.const is not None:
            return None
        raise _Unclear("it is made of several parameters")
    cut = cut_of(weight.path, weight.shape)
    for op in reversed(views):
        if cut is None:
            return None
        if op.name == "transpose":
            cut = tuple(op.params["permutation"]).index(cut)
        elif op.name != "convert_element_type":
            before, old = math.prod(op.operands[0].shape[:cut]), op.operands[0].shape
            fits = [d for d, n in enumerate(op.result.shape) if n > 1 and math.prod(op.result.shape[:d]) == before]
            if not fits or old[cut] % op.result.shape[fits[0]]:
                raise _Unclear("a reshape merges the dimension that they share")
            cut = fits[0]
    return cut


def _is_shared(weight: Value, users: dict[Value, list[Op]], outputs: set[Value]) -> bool:
    """Whether a weight, or what it is a view of, has another reader."""
    while True:
        if len(users.get(weight, ())) != 1 or weight in outputs:
            return True
        op = weight.op
        if op is None or op.name not in ("transpose", "reshape", "convert_element_type", "squeeze"):
            return False
        weight = op.operands[0]


def _site(siblings: Sequence[_Projection], num_shards: int) -> Site:
    widths = [p.width // num_shards for p in siblings]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    shards = (num_shards,) if num_shards > 1 else ()
    first = siblings[0]
    num = len(first.contracted[0])
    dimensions = ((first.contracted[0], tuple(range(num))), ((), ()))
    params = {key: first.op.params[key] for key in ("precision", "preferred_element_type")}

    def build(x: Any, *weights: Any) -> list[Any]:
        columns = [_columns(p, w, shards) for p, w in zip(siblings, weights, strict=True)]
        joined = jnp.concatenate(columns, axis=-1)
        joined = joined.reshape(*joined.shape[:num], sum(widths) * num_shards)
        out = lax.dot_general(x, joined, dimensions, **params)
        out = out.reshape(*out.shape[:-1], *shards, sum(widths))
        parts = [lax.slice_in_dim(out, s, s + w, axis=-1) for s, w in zip(starts, widths, strict=True)]
        return [_result(p, part, len(shards)) for p, part in zip(siblings, parts, strict=True)]

    return Site([first.activation, *(p.weight for p in siblings)], [p.op.result for p in siblings], build)


def _columns(p: _Projection, weight: Any, shards: tuple[int, ...]) -> Any:
    """A weight as `[*contracted, *shards, columns of a shard]`."""
    contracted = p.contracted[1]
    weight = jnp.transpose(weight, (*contracted, *p.free))
    return weight.reshape(*weight.shape[: len(contracted)], *shards, -1)


def _result(p: _Projection, part: Any, num_shard_dims: int) -> Any:
    """`[*rows, *shards, columns]` as the product gave it."""
    rows = part.shape[: part.ndim - 1 - num_shard_dims]
    part = part.reshape(*rows, *(p.weight.shape[i] for i in p.free))
    if p.side == 0:  # the weight's dimensions come first
        part = jnp.moveaxis(part, range(len(rows)), range(len(p.free), part.ndim))
    return part
