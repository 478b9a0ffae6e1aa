"""Stores weights quantized: products become `quantized_dot`, look-ups take quantized rows and dequantize those.

Matches: `dot_general` in any layout with one operand that parameters alone determine, and `gather` of whole rows of
such a table, behind transposes, reshapes and casts, in the program and in the bodies of `scan`, whose weights are then
quantized in a stack, of `while` and of `cond`. A weight that is read twice (a tied table) is stored once. Does not
match: products of two activations; integers; weights that a random generator makes; what would not be smaller; a weight
that is also read as it is, whose float copy would have to stay; weights that a body computes itself. Must run after:
`simplify`, and whatever merges or moves weights. Numerics: approximate. Of a weight the budget is the scheme's
`rounding_error`, as a share of the largest in its group; of a product on random operands it is the scheme's `budget`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from passes import compat
from passes.dce import dce
from passes.graph import Graph, Op, Value
from passes.numerics import Numerics
from passes.ops.stored import stored
from passes.quantization import schemes
from passes.quantization.instances import make_instance
from passes.quantization.packing import XLA, Packing
from passes.quantization.replacements import product, rows_of_table
from passes.quantization.rules import QuantizationRule, Rules, find_rule
from passes.quantization.schemes import Scheme
from passes.quantization.scopes import Scope
from passes.quantization.sites import Site, find_sites
from passes.quantization.views import Canonical
from passes.regions import Role, Slot, set_slots, slots
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter
from passes.splice import Splicer

MIN_CONTRACTED = 16
"""Weights a channel, at least: below, scales and the rounding of activations cost more than is saved."""


def quantize_weights(
    graph: Graph,
    rules: Rules,
    counter: RewriteCounter | None = None,
    *,
    packing: Packing = XLA,
    is_trainable: bool = False,
) -> PassResult:
    """Rewrites in place; a remark for every weight that stays as it is.

    Args:
      graph: Parameters are its inputs with a path.
      counter: Asked before each rewrite.
      packing: How quantized weights are stored.
      is_trainable: Keeps the float weights as an operand, so that gradients reach them (straight-through).
    """
    plans, remarks = _plan(find_sites(graph), rules)
    if counter is not None:
        plans = [plan for plan in plans if counter.allows("quantize_weights", plan.site.op.source)]
    rewrites = _instances(plans, packing)
    if plans:
        _run(plans, packing, is_trainable)
        dce(graph)
    return PassResult(len(plans), tuple(remarks), rewrites)


def _instances(plans: Sequence[_Plan], packing: Packing) -> tuple[Rewrite, ...]:
    """What validates the plans; one for those that are alike."""
    distinct = {(_function_key(plan), plan.site.weight.shape): plan for plan in reversed(plans)}
    return tuple(_instance(plan, packing) for plan in reversed(distinct.values()))


def _instance(plan: _Plan, packing: Packing) -> Rewrite:
    rules = [QuantizationRule(".*", "*", plan.scheme)]

    def rewrite(graph: Graph) -> None:
        _run(_plan(find_sites(graph), rules)[0], packing, is_trainable=False)

    before, after = make_instance(plan.site.op, plan.site.operand, rewrite)
    name = f"quantize_weights({plan.scheme.name}) of {_name(plan.site)}"
    source = plan.site.op.source
    return Rewrite(name, Numerics.APPROXIMATE, before, after, source, plan.scheme.budget)


def decided_sites(graph: Graph) -> list[tuple[str, str]]:
    """Path and kind of each weight that rules can decide about."""
    return [(path, site.kind) for site in find_sites(graph) if site.obstacle is None for path in site.paths]


# ------------------------------------------------------------------------------------------------- what to quantize
@dataclass(frozen=True)
class _Plan:
    site: Site
    scheme: Scheme
    canonical: Canonical

    @property
    def key(self) -> tuple[Value, Canonical, Scheme]:
        """Plans of one key share what is stored."""
        return self.site.view.root, self.canonical, self.scheme.of_weights


@dataclass(frozen=True)
class _Declined:
    """A site that stays; `is_wanted` where a rule says that its weight shall be a float."""

    site: Site
    reason: str
    is_wanted: bool = False


def _plan(sites: Sequence[Site], rules: Rules) -> tuple[list[_Plan], list[Remark]]:
    decided = [_decide(site, rules) for site in sites]
    declined = [d for d in decided if isinstance(d, _Declined)]
    plans = [d for d in decided if isinstance(d, _Plan)]
    kept_wanted = {id(d.site.op) for d in declined if d.is_wanted}
    while escaped := [d for plan in plans if (d := _escape(plan.site, plans, kept_wanted)) is not None]:
        declined += escaped
        gone = {id(d.site) for d in escaped}
        plans = [plan for plan in plans if id(plan.site) not in gone]
    return plans, [Remark.at(d.site.op, f"{_name(d.site)} is not quantized: {d.reason}") for d in declined]


def _name(site: Site) -> str:
    return ", ".join(site.paths) or "a constant"


def _decide(site: Site, rules: Rules) -> _Plan | _Declined:
    if site.obstacle is not None:
        return _Declined(site, site.obstacle)
    found = [find_rule(rules, path, site.kind) for path in site.paths]
    wanted = {None if rule is None else rule.scheme for rule in found}
    if len(wanted) > 1:
        return _Declined(site, "the rules differ for the parameters that it is made of")
    (scheme,) = wanted
    if scheme is None:
        reason = "no rule is about it" if found[0] is None else f"rule {found[0]} says so"
        return _Declined(site, reason, is_wanted=True)
    canonical = site.canonical()
    num_channels, size = math.prod(canonical.shape[:-1]), canonical.shape[-1]
    if size < MIN_CONTRACTED:
        return _Declined(site, f"it is too small, with {size} weights a channel")
    nbytes, before = scheme.nbytes(num_channels, size), num_channels * size * site.weight.dtype.itemsize
    if nbytes >= before:
        return _Declined(site, f"it is too small, {nbytes} bytes with scales and {before} without")
    return _Plan(site, scheme, canonical)


def _escape(site: Site, plans: Sequence[_Plan], kept_wanted: set[int]) -> _Declined | None:
    """A reader that needs the weight as it is, so that it would be stored twice; one that a rule wants is none."""
    planned = {(id(plan.site.op), plan.site.operand) for plan in plans}
    root = site.view.root

    def readers(scope: Scope, value: Value) -> str | None:
        if value in scope.graph.outputs:
            return "its weight is a result too" if scope.owner is None else f"a `{scope.owner.name}` hands it on"
        for op in scope.graph.ops:
            for i, operand in enumerate(op.operands):
                if operand is not value or (id(op), i) in planned or id(op) in kept_wanted:
                    continue
                reason = of_op(scope, op, value)
                if reason is not None:
                    return reason
        return None

    def of_op(scope: Scope, op: Op, value: Value) -> str | None:
        inner = list(scope.inner(op))
        if all(scope.is_static(v) for v in op.operands):
            larger = [result for result in op.results if result.size >= root.size]
            return next((reason for result in larger if (reason := readers(scope, result)) is not None), None)
        for body in inner:
            for inside, slot in (body.slots or {}).items():
                if slot.operand is value:
                    reason = readers(body, inside) if inside in body.static else f"a `{op.name}` changes it"
                    if reason is not None:
                        return reason
        return None if inner else f"`{op.name}` at {op.source.short} reads it as it is"

    reason = readers(site.view.scope, root)
    return None if reason is None else _Declined(site, reason)


# ------------------------------------------------------------------------------------------------------ the rewriting
@dataclass(frozen=True)
class _Kept:
    """What is stored of a weight, as values of one scope; `origin` is the weight where gradients shall reach it."""

    qvalue: Value
    scale: Value
    origin: Value | None

    @property
    def values(self) -> list[Value]:
        return [self.qvalue, self.scale] + ([] if self.origin is None else [self.origin])


def _run(plans: Sequence[_Plan], packing: Packing, is_trainable: bool) -> None:
    _Run(packing, is_trainable).run(plans)


class _Run:
    """One run of the pass."""

    def __init__(self, packing: Packing, is_trainable: bool):
        self._packing, self._is_trainable = packing, is_trainable
        self._splicer = Splicer()
        self._kept: dict[Any, _Kept] = {}
        self._behind: dict[tuple[int, int | None], list[Op]] = {}  # new operations behind an old one, by scope
        self._instead: dict[int, tuple[list[Op], Value]] = {}
        self._imported: dict[tuple[int, Value], Value] = {}

    def run(self, plans: Sequence[_Plan]) -> None:
        graphs: dict[int, Graph] = {}
        for plan in plans:
            kept = self._bring_in(plan, self._store(plan))
            replacement = product if plan.site.kind == "dot" else rows_of_table
            fn, operand = replacement(plan.site, plan.scheme, self._packing)
            ops, (result,) = self._splicer.splice(_function_key(plan), fn, [operand, *kept.values], plan.site.op.source)
            self._instead[id(plan.site.op)] = ops, result
            for scope in (plan.site.scope, plan.site.view.scope):
                graphs[id(scope.graph)] = scope.graph
        for graph in graphs.values():
            self._rebuild(graph)

    def _store(self, plan: _Plan) -> _Kept:
        """Quantizes the weight where it is defined."""
        if plan.key not in self._kept:
            root, scope, scheme = plan.site.view.root, plan.site.view.scope, plan.scheme

            def fn(root: Any) -> list[Any]:
                weight = plan.canonical(root)
                qvalue, scale = schemes.quantize(weight, scheme)
                out = [stored(self._packing.pack(qvalue, scheme)), stored(scale)]
                return out + ([weight] if self._is_trainable else [])

            key = ("store", plan.canonical, scheme.of_weights)
            ops, values = self._splicer.splice(key, fn, [root], root.source)
            place = (id(scope.graph), None if root.op is None else id(root.op))
            self._behind.setdefault(place, []).extend(ops)
            self._kept[plan.key] = _Kept(values[0], values[1], values[2] if self._is_trainable else None)
        return self._kept[plan.key]

    def _bring_in(self, plan: _Plan, kept: _Kept) -> _Kept:
        """What is stored, as values of the body that the site stands in."""
        values = kept.values
        for scope, is_scanned in plan.site.view.path:
            values = [self._import(scope, value, is_scanned) for value in values]
        return _Kept(values[0], values[1], values[2] if self._is_trainable else None)

    def _import(self, scope: Scope, value: Value, is_scanned: bool) -> Value:
        key = (id(scope.graph), value)
        if key not in self._imported and scope.owner is not None:
            shape = value.shape[1:] if is_scanned else value.shape
            role = _role_in(scope, is_scanned)
            # Every branch of a `cond` takes every operand.
            regions = scope.owner.regions if scope.owner.name == "cond" else (scope.graph,)
            new = Slot(value, role, tuple((region, Value(compat.shaped(shape, value.dtype))) for region in regions))
            found = [*slots(scope.owner), new]
            set_slots(scope.owner, sorted(found, key=lambda slot: _ORDER.index(slot.role)))
            self._imported.update({(id(region), value): inside for region, inside in new.inputs})
        return self._imported[key]

    def _rebuild(self, graph: Graph) -> None:
        ops = list(self._behind.get((id(graph), None), []))
        replacements: dict[Value, Value] = {}
        for op in graph.ops:
            new_ops, result = self._instead.get(id(op), ([op], None))
            ops += new_ops
            if result is not None:
                replacements[op.result] = result
            ops += self._behind.get((id(graph), id(op)), [])
        graph.ops = ops
        graph.replace(replacements)


_ORDER = (Role.INDEX, Role.COND_CONST, Role.CONST, Role.CARRY, Role.SCANNED)
"""Of the operands of a loop or condition."""


def _role_in(scope: Scope, is_scanned: bool) -> Role:
    """What a weight is to the loop or condition whose body it is handed to."""
    owner = scope.owner
    if is_scanned:
        return Role.SCANNED
    is_condition = owner is not None and owner.name == "while" and scope.graph is owner.regions[0]
    return Role.COND_CONST if is_condition else Role.CONST


def _function_key(plan: _Plan) -> Any:
    """Equal for sites that are rewritten to the same operations, but for the shapes of their operands."""
    op, view = plan.site.op, plan.site.view
    number = {factor: i for i, factor in enumerate(f for factors in view.dims for f in factors)}
    operand = tuple(tuple((number[f], f.size) for f in factors) for factors in view.operand_dims)
    root = tuple(tuple((f.part, f.size) for f in factors) for factors in view.dims)
    params = tuple(sorted(((k, v) for k, v in op.params.items() if k not in ("out_sharding",)), key=lambda i: i[0]))
    return plan.site.kind, plan.site.operand, plan.scheme, plan.canonical, operand, root, params, op.result.dtype
