"""Finds softmax attention by the roles of axes, whatever the layout and the order of operations.

Starts at a product of weights and values and looks up: weights that are exponentials over their sum along the
contracted axes, exponents that are a score minus anything that does not vary along them, scores that are elementwise in
a product of queries and keys and in what else varies along the same axes. Numbers may be divided out before or after
the values, sinks may enter the sum alone.

Knows how attention is written and nothing of what replaces it. The one idea: axes, not positions, say what is what: the
axes that are summed, divided out and contracted with the values must be the same, and must be those that the keys have
and the queries lack.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from passes.axes import (
    Axes,
    Axis,
    Dims,
    View,
    contraction_views,
    fresh,
    look_through,
    operand_views,
    reduction_view,
    scalar_of,
)
from passes.graph import Graph, Op, Value
from passes.incremental.rules.pointwise import POINTWISE

_LOG2_E = 1.4426950408889634


Users = Mapping[Value, Collection[Op]]
"""Who reads a value."""


class NoMatch(Exception):
    """Why a product is no attention; `near` when a softmax was found, so that a remark is due."""

    def __init__(self, reason: str, op: Op | None, near: bool = False):
        super().__init__(reason)
        self.reason, self.op, self.near = reason, op, near


@dataclass(frozen=True)
class Product:
    """A contraction of two values: as a `dot_general`, or as a sum over an elementwise product."""

    op: Op
    first: View
    second: View
    contracted: tuple[Axis, ...]


@dataclass
class Attention:
    """What was found.

    Attributes:
      root: The value that attention gives, in the axes `dims`.
      axes: What is known of all axes.
      product: Of weights and values.
      score: What the softmax is of.
      cores: The products of queries and keys that enter the scores, queries first, with their results.
      summed: The axes of the softmax.
      sinks: Logits that enter the denominator alone.
      base: What scores are multiplied by before the natural exponential; not 1 for `exp2`.
      inside: Operations of its own, which nothing else may need.
    """

    root: Value
    dims: Dims
    axes: Axes
    product: Product
    values: View
    weights: View
    score: View
    cores: list[tuple[Value, Product]]
    summed: tuple[Axis, ...]
    sinks: View | None
    base: float
    inside: set[Op]


def find_products(graph: Graph) -> Iterator[Op]:
    """Operations that may be the product of weights and values."""
    for op in graph.ops:
        if op.name == "dot_general" or op.name == "reduce_sum" and _summed_product(op) is not None:
            yield op


def recognize(op: Op, users: Users) -> Attention:
    """Attention whose weights meet its values in `op`.

    Raises:
      NoMatch: It is none.
    """
    dims = fresh(op.results[0].shape)
    failure: NoMatch | None = None
    for first_is_weights in (True, False):
        try:
            return _recognize(op, dims, first_is_weights, users)
        except NoMatch as found:
            if failure is None or found.near:
                failure = found
    raise failure or NoMatch("no weights", op)


def _recognize(op: Op, dims: Dims, first_is_weights: bool, users: Users) -> Attention:
    product = product_of(op, dims)
    if product is None:
        raise NoMatch("not a product", op)
    weights, values = (product.first, product.second) if first_is_weights else (product.second, product.first)
    search = _Search(Axes(), {op}, product.contracted)
    if not product.contracted:
        raise NoMatch("nothing is contracted", op)
    softmax = search.softmax(weights, product.contracted)
    root, root_dims = op.results[0], dims
    if softmax.sum is None:
        root, root_dims, softmax = search.divided_after(op.results[0], dims, softmax, users)
    score = softmax.exponent
    cores = search.cores(score, product.contracted)
    return Attention(
        root,
        root_dims,
        search.axes,
        product,
        values,
        weights,
        score,
        cores,
        search.axes.expand(product.contracted),
        softmax.sinks,
        softmax.base,
        search.inside,
    )


def product_of(op: Op, dims: Dims) -> Product | None:
    """A contraction with its result in the axes `dims`."""
    if op.name == "dot_general":
        first, second, contracted = contraction_views(op, dims)
        return Product(op, first, second, contracted)
    mul = _summed_product(op)
    if mul is None:
        return None
    summed, contracted = reduction_view(op, dims)
    view, _ = look_through(summed, Axes())
    first, second = operand_views(mul, view.dims)
    return Product(op, first, second, contracted)


def _summed_product(op: Op) -> Op | None:
    """The elementwise product that a sum adds up, where both operands are arrays."""
    if op.name != "reduce_sum":
        return None
    view, _ = look_through(View(op.operands[0], fresh(op.operands[0].shape)), Axes())
    mul = view.value.op
    is_product = mul is not None and mul.name == "mul" and all(len(v.shape) > 1 for v in mul.operands)
    return mul if is_product else None


@dataclass(frozen=True)
class _Softmax:
    """Weights taken apart: `exp(exponent - shift) / (sum + exp(sinks - shift))`, whose sum may not be there."""

    exponential: View
    exponent: View
    shift: View | None
    sum: View | None
    sinks: View | None
    base: float


@dataclass
class _Search:
    """One search; what it learns of axes accumulates."""

    axes: Axes
    inside: set[Op]
    summed_axes: tuple[Axis, ...]

    def look(self, view: View) -> View:
        view, self.axes = look_through(view, self.axes)
        return view

    def softmax(self, weights: View, summed: tuple[Axis, ...]) -> _Softmax:
        """Takes weights apart."""
        view = self.look(weights)
        op = view.value.op
        if op is None:
            raise NoMatch("the weights are given", None)
        if op.name == "slice":
            return self._sliced_sinks(op, view, summed)
        if op.name == "div":
            top, bottom = operand_views(op, view.dims)
            return self._quotient(op, top, bottom, summed)
        if op.name == "mul":
            for i, other in ((0, 1), (1, 0)):
                views = operand_views(op, view.dims)
                inverse = self._inverse(views[other])
                if inverse is not None:
                    return self._quotient(op, views[i], inverse, summed)
        if op.name in ("exp", "exp2"):
            return self._exponential(view, summed)
        raise NoMatch("the weights are no softmax", op)

    def _inverse(self, view: View) -> View | None:
        """What a value is one over."""
        view = self.look(view)
        op = view.value.op
        if op is not None and op.name == "div" and scalar_of(op.operands[0]) == 1.0:
            self.inside.add(op)
            return operand_views(op, view.dims)[1]
        if op is not None and op.name == "integer_pow" and op.params["y"] == -1:
            self.inside.add(op)
            return operand_views(op, view.dims)[0]
        return None

    def _quotient(self, op: Op, top: View, bottom: View, summed: tuple[Axis, ...]) -> _Softmax:
        inner = self._exponential(self.look(top), summed)
        if inner.sum is not None:
            raise NoMatch("the weights are divided twice", op)
        self.inside.add(op)
        return self._divided_by(inner, bottom, summed)

    def _divided_by(self, softmax: _Softmax, bottom: View, summed: tuple[Axis, ...]) -> _Softmax:
        """The softmax with a denominator, which must be the sum of the same exponentials along `summed`."""
        bottom = self.look(bottom)
        op, sinks = bottom.value.op, None
        if op is not None and op.name == "add":
            for i, other in ((0, 1), (1, 0)):
                views = operand_views(op, bottom.dims)
                found = self._sink(self.look(views[other]), softmax)
                if found is not None:
                    self.inside.add(op)
                    sinks, bottom = found, self.look(views[i])
                    op = bottom.value.op
                    break
        if op is None or op.name != "reduce_sum":
            raise NoMatch("the weights are divided by something else than a sum", op, near=True)
        inner, reduced = reduction_view(op, bottom.dims)
        self._same(self.look(inner), softmax.exponential, op)
        if not _equal(self.axes, reduced, summed):
            raise NoMatch("the sum runs along other axes than the values", op, near=True)
        self.inside.add(op)
        return _Softmax(softmax.exponential, softmax.exponent, softmax.shift, bottom, sinks, softmax.base)

    def _sink(self, view: View, softmax: _Softmax) -> View | None:
        """The logit of `exp(logit - shift)`, with the shift of the softmax."""
        op = view.value.op
        if op is None or op.name not in ("exp", "exp2") or view.value is softmax.exponential.value:
            return None
        inner = self.look(operand_views(op, view.dims)[0])
        if softmax.shift is None:
            self.inside.add(op)
            return inner
        sub = inner.value.op
        if sub is None or sub.name != "sub":
            return None
        logit, shift = operand_views(sub, inner.dims)
        shift = self.look(shift)
        if shift.value is not softmax.shift.value:
            return None
        self.inside.update((op, sub))
        return logit

    def _exponential(self, view: View, summed: tuple[Axis, ...]) -> _Softmax:
        """An exponential of a score, less a shift that does not vary along `summed`; or of a log-softmax."""
        op = view.value.op
        if op is None or op.name not in ("exp", "exp2"):
            raise NoMatch("the weights are no exponentials", op)
        self.inside.add(op)
        base = 1.0 if op.name == "exp" else 1.0 / _LOG2_E
        exponent = self.look(operand_views(op, view.dims)[0])
        shift: View | None = None
        while (difference := self._difference(exponent)) is not None:
            left, right, ops = difference
            right = self.look(right)
            if _varies(self.axes, right, summed):
                break
            whole = self._log_sum(right, View(exponent.value, exponent.dims), self.look(left), summed)
            self.inside.update(ops)
            if whole is not None:
                exponential, inner_shift, score = whole
                return _Softmax(exponential, score, inner_shift, right, None, base)
            shift = right if shift is None else shift
            exponent = self.look(left)
        return _Softmax(view, exponent, shift, None, None, base)

    def _difference(self, view: View) -> tuple[View, View, tuple[Op, ...]] | None:
        """What is subtracted from what, written as `a - b`, `-(b - a)` or `a + -b`, and the operations that say so."""
        op = view.value.op
        if op is None:
            return None
        views = operand_views(op, view.dims) if op.name in ("sub", "neg", "add") else []
        if op.name == "sub":
            return views[0], views[1], (op,)
        for i, operand in enumerate(views):
            inner = self.look(operand)
            other = inner.value.op
            if other is not None and (op.name, other.name) == ("neg", "sub"):
                left, right = operand_views(other, inner.dims)
                return right, left, (op, other)
            if other is not None and (op.name, other.name) == ("add", "neg"):
                return views[1 - i], operand_views(other, inner.dims)[0], (op, other)
        return None

    def _log_sum(
        self, right: View, exponent: View, left: View, summed: tuple[Axis, ...]
    ) -> tuple[View, View | None, View] | None:
        """Whether what is subtracted is the logarithm of the sum of exponentials: then the weights are a softmax.

        Returns: The exponentials in that sum, their shift, and the score.
        """
        op, plus = right.value.op, None
        if op is not None and op.name == "add":
            for log, other in (operand_views(op, right.dims), operand_views(op, right.dims)[::-1]):
                found = self.look(log)
                if found.value.op is not None and found.value.op.name == "log":
                    self.inside.add(op)
                    right, plus, op = found, self.look(other), found.value.op
                    break
        if op is None or op.name != "log":
            return None
        total = self.look(operand_views(op, right.dims)[0])
        if total.value.op is not None and total.value.op.name == "abs":  # `logsumexp`, whose sum may have signs
            self.inside.add(total.value.op)
            total = self.look(operand_views(total.value.op, total.dims)[0])
        if total.value.op is None or total.value.op.name != "reduce_sum":
            return None
        inner, reduced = reduction_view(total.value.op, total.dims)
        exponential = self.look(inner)
        if exponential.value.op is None or exponential.value.op.name != "exp":
            return None
        shifted = self.look(operand_views(exponential.value.op, exponential.dims)[0])
        score, shift = left, None
        if plus is None:
            self._same(shifted, left, op)
            if left.value.op is not None and left.value.op.name == "sub":
                score, shift = (self.look(v) for v in operand_views(left.value.op, left.dims))
                self.inside.add(left.value.op)
        else:
            if shifted.value.op is None or shifted.value.op.name != "sub":
                return None
            inner_score, shift = (self.look(v) for v in operand_views(shifted.value.op, shifted.dims))
            if self._is_guarded(shift, plus):
                self._same(inner_score, left, op)
                self.inside.add(shifted.value.op)
            else:
                return None
        if not _equal(self.axes, reduced, summed) or shift is not None and _varies(self.axes, shift, summed):
            raise NoMatch("the sum of the softmax runs along other axes than the values", op, near=True)
        self.inside.update((op, total.value.op, exponential.value.op))
        return exponential, shift, score

    def _is_guarded(self, shift: View, plus: View) -> bool:
        """Whether a shift is another, or that where it is finite and 0 elsewhere (as `logsumexp` writes it)."""
        return shift.value is plus.value

    def _sliced_sinks(self, op: Op, view: View, summed: tuple[Axis, ...]) -> _Softmax:
        """A softmax over scores with a column of sinks joined on, which is cut off again."""
        whole, keys = op.operands[0], self.axes.expand(summed)
        cut = [d for d, dim in enumerate(view.dims) if whole.shape[d] != op.result.shape[d] and dim]
        if (
            len(cut) != 1
            or self.axes.expand(view.dims[cut[0]]) != keys
            or any(s != 1 for s in op.params["strides"] or ())
        ):
            raise NoMatch("the weights are a part of something", op)
        (joined,) = fresh([whole.shape[cut[0]]])
        dims = tuple(joined if d == cut[0] else dim for d, dim in enumerate(view.dims))
        softmax = self.softmax(View(whole, dims), joined)
        score, concatenate = softmax.exponent, softmax.exponent.value.op
        if softmax.sum is None or softmax.sinks is not None or concatenate is None or concatenate.name != "concatenate":
            raise NoMatch("the weights are a part of a softmax", op, near=True)
        place = concatenate.params["dimension"]
        sizes = [v.shape[place] for v in concatenate.operands]
        start = op.params["start_indices"][cut[0]]
        kept = [i for i in range(len(sizes)) if sum(sizes[:i]) == start and sizes[i] == op.result.shape[cut[0]]]
        if (
            self.axes.expand(score.dims[place]) != self.axes.expand(joined)
            or len(kept) != 1
            or sum(sizes) != sizes[kept[0]] + 1
        ):
            raise NoMatch("the softmax is of other things joined than scores and one sink", op, near=True)
        self.inside.update((op, concatenate))
        scores = View(concatenate.operands[kept[0]], _with(score.dims, place, keys))
        (sink,) = (v for i, v in enumerate(concatenate.operands) if i != kept[0] and sizes[i] == 1)
        sinks = View(sink, _with(score.dims, place, ()))
        return _Softmax(softmax.exponential, self.look(scores), softmax.shift, softmax.sum, sinks, softmax.base)

    def divided_after(self, value: Value, dims: Dims, softmax: _Softmax, users: Users) -> tuple[Value, Dims, _Softmax]:
        """The quotient of the products and the sum, where numbers are divided out behind the values."""
        seen = value
        for _ in range(8):
            above = list(users.get(seen, ()))
            quotients = [u for u in above if u.name in ("div", "mul") and len(u.results) == 1]
            if len(above) == 1 and not quotients and _only_moves(above[0]):
                seen = above[0].result
                continue
            for op in quotients:
                found = self._try_quotient(op, seen, value, dims, softmax)
                if found is not None:
                    return found
            break
        raise NoMatch("the exponentials are not divided by their sum", value.op, near=True)

    def _try_quotient(
        self, op: Op, seen: Value, value: Value, dims: Dims, softmax: _Softmax
    ) -> tuple[Value, Dims, _Softmax] | None:
        before, inside = self.axes, set(self.inside)
        out = fresh(op.results[0].shape)
        places = [i for i, v in enumerate(op.operands) if v is seen]
        if not places or (op.name == "div" and places[0] != 0):
            return None
        views = operand_views(op, out)
        top = self.look(views[places[0]])
        try:
            if top.value is not value:
                return None
            found = self.axes.unify_dims(top.dims, dims)
            if found is None:
                return None
            self.axes = found
            bottom: View | None = views[1 - places[0]]
            if op.name == "mul":
                bottom = self._inverse(views[1 - places[0]])
            if bottom is None:
                return None
            summed = self.summed_axes
            softmax = self._divided_by(softmax, bottom, summed)
        except NoMatch:
            self.axes, self.inside = before, inside
            return None
        self.inside.add(op)
        return op.results[0], out, softmax

    def _same(self, first: View, second: View, op: Op) -> None:
        """Two occurrences of one value: their axes are the same."""
        if first.value is not second.value:
            raise NoMatch("the sum is of other exponentials", op, near=True)
        found = self.axes.unify_dims(first.dims, second.dims)
        if found is None:
            raise NoMatch("one value is read along axes that do not fit", op, near=True)
        self.axes = found

    def cores(self, score: View, summed: tuple[Axis, ...]) -> list[tuple[Value, Product]]:
        """The products of queries and keys in a score: the operands of elementwise operations that are one."""
        found: dict[Value, Product] = {}
        self._find_cores(score, summed, found)
        if not found:
            raise NoMatch("the scores hold no product of queries and keys", score.value.op, near=True)
        return list(found.items())

    def _find_cores(self, view: View, summed: tuple[Axis, ...], found: dict[Value, Product]) -> bool:
        """Whether a product was found behind a value."""
        view = self.look(view)
        op = view.value.op
        if op is None or not _varies(self.axes, view, summed):
            return False
        if view.value in found:
            return True
        product = product_of(op, view.dims) if op.name in ("dot_general", "reduce_sum") else None
        if product is not None:
            first, second = (_varies(self.axes, v, summed) for v in (product.first, product.second))
            if first == second:
                return False
            if first:
                product = Product(op, product.second, product.first, product.contracted)
            found[view.value] = product
            self.inside.add(op)
            return True
        if op.name not in POINTWISE or len(op.results) != 1:
            return False
        behind = [self._find_cores(v, summed, found) for v in operand_views(op, view.dims)]
        if any(behind):
            self.inside.add(op)
        return any(behind)


def _only_moves(op: Op) -> bool:
    """Whether an operation lays the same elements out otherwise, or casts them."""
    moves = ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy")
    return op.name in moves and op.result.size == op.operands[0].size


def _with(dims: Dims, place: int, dim: tuple[Axis, ...]) -> Dims:
    """Dimensions with one of them made of other axes."""
    return (*dims[:place], dim, *dims[place + 1 :])


def _varies(axes: Axes, view: View, along: tuple[Axis, ...]) -> bool:
    """Whether a value has any of some axes."""
    return bool(set(axes.flat(view.dims)) & set(axes.expand(along)))


def _equal(axes: Axes, first: tuple[Axis, ...], second: tuple[Axis, ...]) -> bool:
    return set(axes.expand(first)) == set(axes.expand(second))
