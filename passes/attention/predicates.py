"""Predicates of indices as masks of the algebra: which comparisons are offsets, ranges, lengths, segments or flags.

Matches: and, or, not and selections of booleans; comparisons of integers that are linear in the query's and the key's
index; numbers of a request among them (`cache_len[b] + t`, `k < length[b]`); equality of what queries bear and what
keys bear; flags of keys; dense tables. Any other predicate of both indices stays an expression, as `Lifted`.
Does not match: predicates that differ between heads, or by a rule between requests.

The one idea: a comparison is brought to `linear >= 0`, and the coefficients say what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import lax

from passes.attention.expression import Apply, Constant, Expression, Index, Leaf, evaluate, rewrite, walk
from passes.masks import (
    All,
    Answer,
    BlockTable,
    KeyFlag,
    KeyLength,
    KeyRange,
    Look,
    Mask,
    Nothing,
    Offset,
    QueryRange,
    Read,
    Segment,
)


class NotAMask(Exception):
    """A predicate that is no rule of query and key positions."""


@dataclass(frozen=True)
class Lifted(Mask):
    """A predicate in its own words: `expression` of both indices; its leaf i is what `reads[i]` reads."""

    expression: Expression
    held: tuple[Read, ...]

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.held

    @property
    def reads_query(self) -> bool:
        return "t" in roles_of(self.expression)

    def evaluate(self, q: Any, k: Any, look: Look) -> Any:
        return evaluate(self.expression, None, {"t": q, "s": k}, [look(read) for read in self.held]) & (k == k)

    def block(self, q0: Any, q1: Any, k0: Any, k1: Any, look: Look | None = None) -> Answer:
        return True, False


@dataclass
class RuntimeValues:
    """The leaves of a mask: expressions of an attention's leaves, by number."""

    of: list[Expression] = field(default_factory=list)

    def number(self, expression: Expression) -> int:
        if expression not in self.of:
            self.of.append(expression)
        return self.of.index(expression)


@dataclass(frozen=True)
class _Linear:
    """`t * query index + s * key index + const + rest`, `rest` a sum of numbers of a request."""

    t: int = 0
    s: int = 0
    const: int = 0
    rest: tuple[tuple[Expression, int], ...] = ()

    def plus(self, other: _Linear, times: int = 1) -> _Linear:
        rest = dict(self.rest)
        for term, factor in other.rest:
            rest[term] = rest.get(term, 0) + times * factor
        left = tuple((term, factor) for term, factor in rest.items() if factor)
        return _Linear(self.t + times * other.t, self.s + times * other.s, self.const + times * other.const, left)


def lift_predicate(predicate: Expression) -> tuple[Mask, tuple[Expression, ...], Expression | None]:
    """The mask of a predicate.

    Returns: The mask; what its leaves are; and what is added to a query's index to give the position that the mask
      speaks of, a number for each request, or None for nothing.

    Raises:
      NotAMask: It differs between heads, or by a rule between requests.
    """
    for start in dict.fromkeys([*_starts(predicate), None]):
        lifting = _Lifting(start)
        try:
            mask = lifting.mask(predicate)
        except NotAMask:
            if start is None:
                raise
            continue
        if start is None or not lifting.has_index:
            return mask, tuple(lifting.values.of), None if start is None else _sum(start)
    raise NotAMask("no start fits")


def roles_of(expression: Expression) -> set[str]:
    """The roles that an expression depends on."""
    out: set[str] = set()
    for node in walk(expression):
        if isinstance(node, Index):
            out.add(node.role)
        elif isinstance(node, Leaf):
            out.update(node.roles)
    return out


def _leaves_of(expression: Expression) -> list[Leaf]:
    return [node for node in walk(expression) if isinstance(node, Leaf)]


Terms = tuple[tuple[Expression, int], ...]


def _starts(predicate: Expression) -> Iterator[Terms]:
    """What is added to the query's index where it is compared with the key's."""
    for node in walk(predicate):
        difference = _difference(node)
        if difference is not None and difference.rest and abs(difference.t) == 1 and difference.s == -difference.t:
            yield tuple((term, factor * difference.t) for term, factor in difference.rest)


def _sum(terms: Terms) -> Expression:
    out: Expression | None = None
    for term, factor in terms:
        part = term if factor == 1 else Apply(lax.mul_p, (), (term, Constant(factor, "int32")))
        out = part if out is None else Apply(lax.add_p, (), (out, part))
    return Constant(0, "int32") if out is None else out


_COMPARISONS = ("ge", "gt", "le", "lt", "eq", "ne")


def _difference(node: Expression) -> _Linear | None:
    """Left minus right of a comparison of integers."""
    if not isinstance(node, Apply) or node.name not in _COMPARISONS:
        return None
    left, right = (linear(operand) for operand in node.operands)
    return None if left is None or right is None else left.plus(right, -1)


def linear(expression: Expression) -> _Linear | None:
    """An integer expression that is linear in both indices; None for others."""
    if isinstance(expression, Index):
        is_exact = np.dtype(expression.dtype).itemsize >= 4
        known = {"t": _Linear(t=1), "s": _Linear(s=1)}.get(expression.role)
        return known if is_exact else None
    if isinstance(expression, Constant):
        value = float(expression.value)
        return _Linear(const=int(value)) if expression.dtype != "bool" and value.is_integer() else None
    if isinstance(expression, Apply) and expression.name in ("add", "sub", "neg", "mul", "convert_element_type"):
        known = _linear_of(expression, [linear(operand) for operand in expression.operands])
        if known is not None:
            return known
    of_request = roles_of(expression) <= {"b"} and bool(_leaves_of(expression))
    return _Linear(rest=((expression, 1),)) if of_request and "b" not in _indices_of(expression) else None


def _indices_of(expression: Expression) -> set[str]:
    return {node.role for node in walk(expression) if isinstance(node, Index)}


def _linear_of(node: Apply, parts: list[_Linear | None]) -> _Linear | None:
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    if node.name == "convert_element_type":
        dtype = np.dtype(dict(node.params)["new_dtype"])
        is_exact = dtype.itemsize >= 4 and dtype.kind in "iuf"
        return known[0] if is_exact and not known[0].rest else None
    if node.name == "neg":
        return _Linear().plus(known[0], -1)
    if node.name == "mul":
        for one, other in (known, known[::-1]):
            if not (one.t or one.s or one.rest):
                return _Linear().plus(other, one.const)
        return None
    return known[0].plus(known[1], 1 if node.name == "add" else -1)


@dataclass
class _Lifting:
    """One lifting. `start` is taken as part of the query's position; `has_index` where the plain index was needed."""

    start: Terms | None
    values: RuntimeValues = field(default_factory=RuntimeValues)
    has_index: bool = False

    def mask(self, node: Expression) -> Mask:
        if isinstance(node, Constant):
            return All() if node.value else Nothing()
        if isinstance(node, Apply):
            connective = _CONNECTIVES.get(node.name)
            if connective is not None and all(is_boolean(operand) for operand in node.operands):
                return connective(*(self.mask(operand) for operand in node.operands))
            if node.name in _COMPARISONS:
                found = self._comparison(node)
                if found is not None:
                    return found
            if node.name == "convert_element_type" and is_boolean(node.operands[0]):
                return self.mask(node.operands[0])
        return self._other(node)

    def _comparison(self, node: Apply) -> Mask | None:
        left, right = node.operands
        for one, place in ((left, 0), (right, 1)):
            other = node.operands[1 - place]
            if isinstance(one, Apply) and one.name == "select_n" and isinstance(other, Constant):
                cases = [_compared(node, place, case) for case in one.operands[1:]]
                if len(cases) == 2 and cases[0] is not None and cases[1] is not None:
                    return _select(self.mask(one.operands[0]), cases[0], cases[1])
        if node.name in ("eq", "ne"):
            segment = self._segment(left, right) or self._segment(right, left)
            if segment is not None:
                return segment if node.name == "eq" else ~segment
            known = _boolean_constant(left, right)
            if known is not None:
                inner = self.mask(known[0])
                return inner if known[1] == (node.name == "eq") else ~inner
        for one, other, name in ((left, right, node.name), (right, left, _MIRROR[node.name])):
            if isinstance(one, Apply) and one.name == "abs":
                return self._of_distance(one.operands[0], other, name)
        difference = _difference(node)
        return None if difference is None else self._of_difference(difference, node.name)

    def _of_difference(self, d: _Linear, name: str) -> Mask | None:
        """`d name 0`."""
        if name in ("eq", "ne"):
            least, most = self._at_least(d), self._at_least(_Linear().plus(d, -1))
            if least is None or most is None:
                return None
            return least & most if name == "eq" else ~(least & most)
        if name in ("lt", "le"):
            d = _Linear().plus(d, -1)
        return self._at_least(d if name in ("ge", "le") else d.plus(_Linear(const=-1)))

    def _of_distance(self, inner: Expression, bound: Expression, name: str) -> Mask | None:
        """`|inner| name bound`."""
        x, limit = linear(inner), linear(bound)
        if x is None or limit is None:
            return None
        if name in ("eq", "ne"):
            return None
        over = name in ("gt", "ge")
        below = {"lt": "lt", "le": "le", "gt": "le", "ge": "lt"}[name]
        parts = [self._of_difference(_Linear().plus(x, sign).plus(limit, -1), below) for sign in (1, -1)]
        if parts[0] is None or parts[1] is None:
            return None
        inside = parts[0] & parts[1]
        return ~inside if over else inside

    def _at_least(self, d: _Linear) -> Mask | None:
        """`d >= 0`."""
        if self.start and d.t:
            d = d.plus(_Linear(rest=self.start), -d.t)
            self.has_index |= bool(d.rest) or (d.t != 0 and abs(d.t) != 1)
        c = d.const
        if not d.rest:
            rules: dict[tuple[int, int], Callable[[], Mask]] = {
                (1, -1): lambda: Offset(-c, None),
                (-1, 1): lambda: Offset(None, c),
                (0, 1): lambda: KeyRange(-c, None),
                (0, -1): lambda: KeyRange(None, c + 1),
                (1, 0): lambda: QueryRange(-c, None),
                (-1, 0): lambda: QueryRange(None, c + 1),
                (0, 0): lambda: All() if c >= 0 else Nothing(),
            }
            rule = rules.get((d.t, d.s))
            return None if rule is None else rule()
        if d.t or abs(d.s) != 1:
            return None
        # -k + rest + c >= 0 is k < rest + c + 1; k + rest + c >= 0 is the contrary of k < -rest - c.
        bound = tuple((term, -d.s * factor) for term, factor in d.rest)
        more = c + 1 if d.s < 0 else -c
        length = _sum(bound) if not more else Apply(lax.add_p, (), (_sum(bound), Constant(more, "int32")))
        rule = KeyLength(self.values.number(length))
        return rule if d.s < 0 else ~rule

    def _segment(self, of_query: Expression, of_key: Expression) -> Mask | None:
        by_query = any("t" in leaf.roles for leaf in _leaves_of(of_query)) and roles_of(of_query) <= {"b", "t"}
        by_key = any("s" in leaf.roles for leaf in _leaves_of(of_key)) and roles_of(of_key) <= {"b", "s"}
        if not by_query or not by_key:
            return None
        self.has_index = True
        return Segment(self.values.number(of_query), self.values.number(of_key))

    def _other(self, node: Expression) -> Mask:
        roles, leaves = roles_of(node), _leaves_of(node)
        if "n" in roles or "b" in _indices_of(node):
            raise NotAMask("a rule for heads or requests")
        if roles <= {"b", "s"} and any("s" in leaf.roles for leaf in leaves):
            return KeyFlag(self.values.number(node))
        is_dense = bool(leaves) and all({"t", "s"} <= set(leaf.roles) for leaf in leaves)
        if is_dense and not _indices_of(node):
            self.has_index = True
            return BlockTable(self.values.number(node), 1, 1)
        self.has_index |= "t" in roles
        reads = tuple(Read(self.values.number(leaf), _way(leaf)) for leaf in leaves)
        places = {leaf: Leaf(i, leaf.roles, leaf.dtype) for i, leaf in enumerate(leaves)}
        return Lifted(rewrite(node, lambda n: places.get(n) if isinstance(n, Leaf) else None), reads)


def _way(leaf: Leaf) -> Any:
    roles = set(leaf.roles) - {"b"}
    return {(): "request", ("t",): "query", ("s",): "key"}.get(tuple(roles), "block")


def _select(which: Mask, *cases: Mask) -> Mask:
    return (~which & cases[0]) | (which & cases[1])


_CONNECTIVES: dict[str, Callable[..., Mask]] = {
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "not": lambda x: ~x,
    "xor": lambda x, y: (x & ~y) | (~x & y),
    "select_n": _select,
}
_MIRROR = {"ge": "le", "le": "ge", "gt": "lt", "lt": "gt", "eq": "eq", "ne": "ne"}


def is_boolean(node: Expression) -> bool:
    """Whether a node is a boolean and no number."""
    if isinstance(node, Constant | Leaf):
        return node.dtype == "bool"
    if not isinstance(node, Apply):
        return False
    if node.name == "convert_element_type":
        return np.dtype(dict(node.params)["new_dtype"]) == np.bool_
    if node.name in ("and", "or", "xor", "not"):
        return is_boolean(node.operands[0])
    if node.name == "select_n":
        return is_boolean(node.operands[1])
    return node.name in _COMPARISONS or node.name == "is_finite"


def _compared(node: Apply, place: int, case: Expression) -> Mask | None:
    """A comparison of two known numbers, one of them put in its place."""
    if not isinstance(case, Constant):
        return None
    operands = tuple(case if i == place else operand for i, operand in enumerate(node.operands))
    return All() if bool(evaluate(Apply(node.primitive, node.params, operands), None, {}, ())) else Nothing()


def _boolean_constant(left: Expression, right: Expression) -> tuple[Expression, bool] | None:
    """A boolean compared with one that is known."""
    for one, other in ((left, right), (right, left)):
        if isinstance(other, Constant) and other.dtype == "bool" and is_boolean(one):
            return one, bool(other.value)
    return None
