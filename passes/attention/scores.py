"""The scores of a found attention as an expression of the product of queries and keys, indices and leaves."""

from __future__ import annotations

from dataclasses import dataclass

from jax import lax

from passes.attention.expression import Apply, Constant, Core, Expression
from passes.attention.lift import Lifting, NotLiftable, cast, hashable
from passes.attention.recognize import Attention, NoMatch, Product
from passes.axes import Axes, Axis, View, fresh, look_through, operand_views
from passes.graph import Value
from passes.incremental.rules.pointwise import POINTWISE


@dataclass(frozen=True)
class ScoreCore:
    """Where the product of queries and keys enters the scores: one product, or the sum of several (MLA)."""

    value: Value
    products: tuple[Product, ...]


def find_core(found: Attention) -> ScoreCore:
    """The one value that stands for the product.

    Raises:
      NoMatch: Several products enter in several places.
    """
    if len(found.cores) == 1:
        value, product = found.cores[0]
        return ScoreCore(value, (product,))
    products = dict(found.cores)
    for op in found.inside:
        if op.name == "add":
            parts = [_root(v) for v in op.operands]
            if set(parts) == set(products) and len(products) == 2:
                return ScoreCore(op.results[0], tuple(products[v] for v in parts))
    raise NoMatch("several products of queries and keys enter the scores", found.root.op, near=True)


def _root(value: Value) -> Value:
    """The value behind layout operations and casts."""
    return look_through(View(value, fresh(value.shape)), Axes())[0].value


def masked_axes(found: Attention, core: ScoreCore) -> tuple[Axis, ...]:
    """Axes of the predicates among the scores' operands, else of their other operands."""
    predicates: list[Axis] = []
    others: list[Axis] = []
    seen: set[Value] = set()

    def visit(view: View) -> None:
        view, _ = look_through(view, found.axes)
        op = view.value.op
        if view.value in seen or view.value is core.value:
            return
        seen.add(view.value)
        axes = found.axes.flat(view.dims)
        is_mask = op not in found.inside and set(axes) & set(found.summed)
        if is_mask and view.value.dtype == bool:
            predicates.extend(axes)
        elif op is not None and op.name in POINTWISE:
            for operand in operand_views(op, view.dims):
                visit(operand)
        if is_mask:
            others.extend(axes)

    visit(found.score)
    return tuple(predicates or others)


def score_expression(found: Attention, core: ScoreCore, lifting: Lifting) -> Expression:
    """The scores.

    Raises:
      NoMatch: Something enters that is neither a function of indices nor an array along their axes.
    """
    memo: dict[Value, Expression] = {}

    def build(view: View) -> Expression:
        value, dtype = view.value, str(view.value.dtype)
        view, _ = look_through(view, found.axes)
        if view.value not in memo:
            memo[view.value] = build_root(view)
        root = memo[view.value]
        return root if str(view.value.dtype) == dtype or value is view.value else cast(root, dtype)

    def build_root(view: View) -> Expression:
        op = view.value.op
        if view.value is core.value:
            return Core()
        if op is None or op not in found.inside:
            return lifting.lift(view)
        return Apply(op.primitive, hashable(op.params), tuple(map(build, operand_views(op, view.dims))))

    try:
        score = build(found.score)
    except NotLiftable as error:
        raise NoMatch(f"the scores hold {error}", found.score.value.op, near=True) from error
    if found.base != 1.0:
        score = Apply(lax.mul_p, (), (score, Constant(found.base, str(found.score.value.dtype))))
    return score
