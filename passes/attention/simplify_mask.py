"""What the scores of an attention are: `where(mask, cap * tanh(scale * product / cap) + bias, fill)`.

Matches: scales by constants before and after; one soft-cap; biases and masks added, selected or multiplied in, in any
order that means the same; fills of -1e9 and below, finfo.min and -inf. Queries that see no key at all are the only ones
that may come out otherwise: they attend to keys they should not see, and which of them depends on the spelling.
Does not match: scales that are no constants, caps over biases. Then None.

The one idea: from the product upwards every operation changes one part of that form, or is not allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from passes.attention.expression import ROLES, Apply, Constant, Core, Expression, evaluate, has_core, walk
from passes.attention.lift import cast
from passes.attention.predicates import NotAMask, is_boolean, lift_predicate, roles_of
from passes.masks import All, Mask

LARGEST_FILL = -9.9e8
"""Fills are this or less: -1e9 rounded to bfloat16 is a little more than -1e9."""


@dataclass(frozen=True)
class Decomposed:
    """Scores taken apart.

    Attributes:
      scale: Of the product of queries and keys.
      soft_cap: None for none.
      mask: Which key positions a query position sees, with leaves numbered as in `leaves`.
      bias: What is added behind the cap, an expression of indices and the attention's leaves; None for nothing.
      leaves: What the mask's leaves are, as expressions of the attention's leaves.
      query_start: What is added to a query's index to give its position, a number for each request; None for nothing.
      fills: What masked scores are made, or have added to them, once for each part of the mask.
    """

    scale: float
    soft_cap: float | None
    mask: Mask
    bias: Expression | None
    leaves: tuple[Expression, ...] = ()
    query_start: Expression | None = None
    fills: tuple[float, ...] = ()

    def mask_leaves(self, sizes: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
        """The mask's leaves as it reads them, each with a leading batch axis.

        Args:
          sizes: B, T, N, S.
          leaves: The attention's leaves, each `[B or 1, T or 1, N or 1, S or 1]`.
        """
        return [spread(expression, sizes, leaves) for expression in self.leaves]

    def starts(self, sizes: Sequence[int], leaves: Sequence[Any]) -> Any:
        """What is added to each request's query indices, `[B]`."""
        if self.query_start is None:
            return jnp.zeros(sizes[0], jnp.int32)
        return spread(self.query_start, sizes, leaves)

    def visible(self, sizes: Sequence[int], leaves: Sequence[Any]) -> Any:
        """The mask written out, `[B, T, S]`."""
        B, T, _, S = sizes
        runtime, starts = self.mask_leaves(sizes, leaves), self.starts(sizes, leaves)
        rows = []
        for b in range(B):
            q = jnp.arange(T)[:, None] + starts[b]
            rows.append(jnp.broadcast_to(self.mask.contains(q, jnp.arange(S)[None], [x[b] for x in runtime]), (T, S)))
        return jnp.stack(rows)

    def scores(self, core: Any, leaves: Sequence[Any]) -> Any:
        """Scores `[B, T, N, S]` of the product, masked ones -inf."""
        x = core * self.scale
        if self.soft_cap is not None:
            x = self.soft_cap * jnp.tanh(x / self.soft_cap)
        if self.bias is not None:
            x = x + evaluate(self.bias, None, _grid(core.shape), leaves)
        return jnp.where(self.visible(core.shape, leaves)[:, :, None], x, -jnp.inf)


def _grid(sizes: Sequence[int]) -> dict[Any, Any]:
    shapes = np.eye(4, dtype=int) * (np.asarray(sizes) - 1) + 1
    return {role: jnp.arange(n).reshape(shape) for role, n, shape in zip(ROLES, sizes, shapes.tolist(), strict=True)}


def spread(expression: Expression, sizes: Sequence[int], leaves: Sequence[Any]) -> Any:
    """An expression's values along the batch and what it depends on beside it."""
    dims = {"b", *roles_of(expression)}
    shape = [size if role in dims else 1 for role, size in zip(ROLES, sizes, strict=True)]
    whole = jnp.broadcast_to(evaluate(expression, None, _grid(sizes), leaves), shape)
    return whole.reshape([n for role, n in zip(ROLES, shape, strict=True) if role in dims])


def decompose(score: Expression) -> Decomposed | None:
    """The parts of a score, or None where they cannot be told apart."""
    try:
        form = _form(score)
    except _NotOfTheForm:
        return None
    scale, cap = form.outer * form.inner, form.outer if form.is_capped else None
    if any(not fill <= LARGEST_FILL for fill in form.fills) or (cap is not None and cap <= 0):
        return None
    bias = _total(form.bias)
    if form.seen is None:
        return Decomposed(scale, cap, All(), bias)
    try:
        mask, leaves, start = lift_predicate(form.seen)
    except NotAMask:
        low = Apply(lax.select_n_p, (), (form.seen, Constant(-np.inf, "float32"), Constant(0.0, "float32")))
        hidden = low if bias is None else Apply(lax.add_p, (), (bias, low))
        return Decomposed(scale, cap, All(), hidden, fills=form.fills)
    return Decomposed(scale, cap, mask, bias, leaves, start, form.fills)


class _NotOfTheForm(Exception):
    pass


@dataclass(frozen=True)
class _Form:
    """`where(seen, outer * f(inner * product) + bias, a fill)`, f the hyperbolic tangent if capped, else nothing."""

    inner: float = 1.0
    outer: float = 1.0
    is_capped: bool = False
    bias: tuple[tuple[float, Expression], ...] = ()
    seen: Expression | None = None
    fills: tuple[float, ...] = ()

    def times(self, factor: float) -> _Form:
        bias = tuple((f * factor, e) for f, e in self.bias)
        return replace(self, outer=self.outer * factor, bias=bias, fills=tuple(f * factor for f in self.fills))

    def where(self, seen: Expression, fill: float) -> _Form:
        return replace(self, seen=_both(self.seen, seen), fills=(*self.fills, fill))

    def plus(self, other: _Form) -> _Form:
        """With an addend, a form whose product counts for nothing."""
        if self.fills and self.fills[-1] == 0.0 and self.seen == other.seen:  # x * seen + fill * (1 - seen)
            return replace(self, bias=self.bias + other.bias, fills=(*self.fills[:-1], *other.fills))
        seen = self.seen if other.seen is None else _both(self.seen, other.seen)
        return replace(self, bias=self.bias + other.bias, seen=seen, fills=self.fills + other.fills)


def _both(first: Expression | None, second: Expression) -> Expression:
    return second if first is None or first == second else Apply(lax.and_p, (), (first, second))


def _form(node: Expression) -> _Form:
    if isinstance(node, Core):
        return _Form()
    if not isinstance(node, Apply):
        raise _NotOfTheForm
    if node.name == "select_n" and len(node.operands) == 3 and not has_core(node.operands[0]):
        return _selected(node)
    inner = [operand for operand in node.operands if has_core(operand)]
    others = [operand for operand in node.operands if not has_core(operand)]
    if len(inner) != 1 or len(others) > 1:
        raise _NotOfTheForm
    form = _form(inner[0])
    if not others:
        return _of_one(node, form)
    (other,) = others
    number, is_first = _number(other), node.operands[0] is inner[0]
    if node.name == "add" or node.name == "sub":
        if node.name == "sub" and not is_first:
            return form.times(-1.0).plus(_addend(other, 1.0))
        return form.plus(_addend(other, 1.0 if node.name == "add" else -1.0))
    if node.name == "mul" and number is not None:
        return form.times(number)
    if node.name == "div" and number is not None and is_first:
        return form.times(1.0 / number)
    if node.name == "max" and number is not None and number <= LARGEST_FILL:
        return form
    if node.name == "mul" and (seen := _indicator(other)) is not None:
        return form.where(seen, 0.0)
    raise _NotOfTheForm


def _of_one(node: Apply, form: _Form) -> _Form:
    if node.name in ("convert_element_type", "copy", "stop_gradient", "reduce_precision"):
        return form
    if node.name == "neg":
        return form.times(-1.0)
    if node.name == "tanh" and not form.is_capped and not form.bias and form.seen is None:
        return _Form(inner=form.outer * form.inner, is_capped=True)
    raise _NotOfTheForm


def _selected(node: Apply) -> _Form:
    which, *cases = node.operands
    for kept in (0, 1):
        fill = _number(cases[1 - kept])
        if fill is not None and has_core(cases[kept]):
            return _form(cases[kept]).where(which if kept else Apply(lax.not_p, (), (which,)), fill)
    raise _NotOfTheForm


def _addend(node: Expression, factor: float) -> _Form:
    """What an addend says of bias and mask; its product counts for nothing."""
    number = _number(node)
    if number is not None:
        return _Form(bias=((factor * number, Constant(1.0, "float32")),) if number else ())
    seen = _indicator(node)
    if isinstance(node, Apply) and seen is None:
        found = _masking(node, factor)
        if found is not None and found.seen is not None:
            return found
    return _Form(bias=((factor, node),))


def _masking(node: Apply, factor: float) -> _Form | None:
    operands = node.operands
    if node.name == "select_n" and len(operands) == 3:
        which, *cases = operands
        for kept in (0, 1):
            fill = _number(cases[1 - kept])
            if fill is not None and fill * factor <= LARGEST_FILL:
                seen = which if kept else Apply(lax.not_p, (), (which,))
                return _addend(cases[kept], factor).where(seen, fill * factor)
    if node.name in ("convert_element_type", "copy", "stop_gradient"):
        return _addend(operands[0], factor)
    if node.name == "neg":
        return _addend(operands[0], -factor)
    if node.name == "log" and (seen := _indicator(operands[0])) is not None:
        return _Form(seen=seen, fills=(-np.inf * factor,))
    if node.name in ("add", "sub"):
        first, second = _addend(operands[0], factor), _addend(operands[1], factor if node.name == "add" else -factor)
        return first.plus(second)
    if node.name in ("mul", "div"):
        for one, other in ((operands[0], operands[1]), (operands[1], operands[0]))[: 2 if node.name == "mul" else 1]:
            number = _number(other)
            if number is not None:
                times = factor * number if node.name == "mul" else factor / number
                hidden = _indicator(one)
                if hidden is not None and times <= LARGEST_FILL:
                    return _Form(seen=_not(hidden), fills=(times,))
                return _addend(one, times)
    return None


def _indicator(node: Expression) -> Expression | None:
    """The predicate that a number is 1 for, and 0 otherwise."""
    if not isinstance(node, Apply):
        return None
    if node.name == "convert_element_type":
        inner = node.operands[0]
        return inner if is_boolean(inner) else _indicator(inner)
    if node.name == "sub" and _number(node.operands[0]) == 1.0:
        inner = _indicator(node.operands[1])
        return None if inner is None else _not(inner)
    if node.name == "mul":
        both = [_indicator(operand) for operand in node.operands]
        return Apply(lax.and_p, (), (both[0], both[1])) if both[0] is not None and both[1] is not None else None
    if node.name == "select_n" and len(node.operands) == 3:
        numbers = [_number(case) for case in node.operands[1:]]
        if numbers == [0.0, 1.0]:
            return node.operands[0]
        return _not(node.operands[0]) if numbers == [1.0, 0.0] else None
    return None


def _not(node: Expression) -> Expression:
    if isinstance(node, Apply) and node.name == "not":
        return node.operands[0]
    return Apply(lax.not_p, (), (node,))


def _number(node: Expression) -> float | None:
    """The number that an expression of constants is."""
    if isinstance(node, Constant):
        return float(node.value)
    if any(not isinstance(part, Constant | Apply) for part in walk(node)):
        return None
    return float(np.asarray(evaluate(node, None, {}, ()), np.float64))


def _total(terms: Sequence[tuple[float, Expression]]) -> Expression | None:
    out: Expression | None = None
    for factor, term in terms:
        part = cast(term, "float32")
        if factor != 1.0:
            part = Apply(lax.mul_p, (), (part, Constant(factor, "float32")))
        out = part if out is None else Apply(lax.add_p, (), (out, part))
    return out
