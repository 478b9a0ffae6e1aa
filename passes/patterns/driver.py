"""Applies rewrite rules until nothing is left to do.

It visits every value of a graph and of its loop bodies, users first, so that the largest match wins, and visits again
what a rewrite made. The one idea: who reads a value is kept up to date, so that a rewrite costs the time of what it
replaces and not of the program.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from passes.axes import View, fresh
from passes.dce import dce
from passes.extract import clone, extract_between
from passes.graph import Graph, Op, Source, Value
from passes.numerics import Numerics
from passes.patterns.pattern import State, Trail
from passes.patterns.rule import Builder, Match, RewriteRule
from passes.reader import trace
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter

MAX_GENERATIONS = 16
"""Rewrites of what a rewrite made, one upon another; more means that it would never end."""
_VIEWS = frozenset({"convert_element_type"})


def apply_rules(graph: Graph, rules: Sequence[RewriteRule], counter: RewriteCounter | None = None) -> PassResult:
    """Rewrites in place to a fixed point, loop bodies too.

    Raises:
      RuntimeError: a rule matches what it makes itself, so that it would never end; the message names it.
    """
    ordered = sorted(rules, key=lambda rule: -rule.benefit)
    result = PassResult()
    for body in bodies_of(graph):
        result += _Rewriting(body, ordered, counter or RewriteCounter()).run()
    if result.matched:
        dce(graph)
    return result


def bodies_of(graph: Graph) -> list[Graph]:
    """The graph and the bodies of its loops and branches."""
    return [graph, *(region for _, op in graph.walk() for region in op.regions)]


class Editor:
    """A graph under change. Invariant: `users` says of each value who reads it; `finish` puts the operations in order.

    Attributes:
      users: Value -> the operations that read it, and how often each does.
      dead: Operations that are gone.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.users: dict[Value, dict[Op, int]] = {}
        self.dead: set[Op] = set()
        self._before: dict[Op, list[Op]] = {}
        self._became: dict[Value, Value] = {}
        self._outputs = set(graph.outputs)
        for op in graph.ops:
            self._count(op)

    def _count(self, op: Op) -> None:
        for value in op.operands:
            readers = self.users.setdefault(value, {})
            readers[op] = readers.get(op, 0) + 1

    def dying(self, roots: Sequence[Value], kept: Sequence[Value]) -> set[Op]:
        """Operations that nobody needs once `roots` come from `kept` alone."""
        replaced, needed, dying = set(roots), {*kept}, set[Op]()
        todo = [root.op for root in roots if root.op is not None]

        def is_free(value: Value) -> bool:
            if value in replaced:
                return True
            if value in needed or value in self._outputs:
                return False
            return all(op in dying for op in self.users.get(value, ()))

        while todo:
            op = todo.pop()
            if op in dying or op.effects or not all(map(is_free, op.results)):
                continue
            dying.add(op)
            todo += [value.op for value in op.operands if value.op is not None]
        return dying

    def replace(self, rewrite: Rewrite, operands: Sequence[Value], roots: Sequence[Value]) -> list[Op]:
        """Makes a rewrite: what reads `roots` now reads the outputs of `rewrite.after`. Returns the new operations."""
        gone = self.dying(roots, operands)
        for op in gone:
            for value in op.operands:
                self.users.get(value, {}).pop(op, None)
        self.dead |= gone
        body = clone(rewrite.after)
        body.replace(dict(zip(body.inputs, operands, strict=True)))
        for op in body.ops:
            self._count(op)
        for root, new in zip(roots, body.outputs, strict=True):
            self._became[root] = new
            for user in self.users.pop(root, {}):
                user.operands = [new if v is root else v for v in user.operands]
                readers = self.users.setdefault(new, {})
                readers[user] = user.operands.count(new)
            if root in self._outputs:
                self.graph.outputs = [new if v is root else v for v in self.graph.outputs]
                self._outputs = set(self.graph.outputs)
        first = next(root.op for root in roots if root.op is not None)
        self._before.setdefault(first, []).extend(body.ops)
        return body.ops

    def now(self, value: Value) -> Value:
        """What a value became."""
        while value in self._became:
            value = self._became[value]
        return value

    def finish(self) -> None:
        """Puts the operations in order: as they stood, each after what it reads."""
        if not self._before:
            return
        done: set[Op] = set()
        ops: list[Op] = []

        def place(first: Op) -> None:
            stack = [(first, False)]
            while stack:
                op, is_ready = stack.pop()
                if op in done:
                    continue
                if is_ready:
                    done.add(op)
                    ops.append(op)
                    continue
                stack.append((op, True))
                stack += [(v.op, False) for v in reversed(op.operands) if v.op is not None and v.op not in done]

        for op in self._in_order():
            place(op)
        self.graph.ops = ops

    def _in_order(self) -> Iterator[Op]:
        """Live operations, new ones before what they replace."""
        stack = list(reversed(self.graph.ops))
        while stack:
            op = stack.pop()
            new = self._before.pop(op, None)
            if new is not None:
                stack += [op, *reversed(new)]
            elif op not in self.dead:
                yield op


def make_rewrite(
    rule: str,
    numerics: Numerics,
    fn: Callable[..., Sequence[Any]],
    operands: Sequence[Value],
    roots: Sequence[Value],
    budget: float | None = None,
) -> Rewrite:
    """The rewrite that computes `roots` as `fn(*operands)`; the program stays as it is.

    Args:
      operands: Values that `roots` depend on and `fn` takes; no constants.
    """
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=getattr(v.aval, "weak_type", False)) for v in operands]
    after, _ = trace(fn, *shapes)
    types = [(v.shape, v.dtype) for v in roots]
    if [(v.shape, v.dtype) for v in after.outputs] != types:
        raise RuntimeError(f"rule {rule} gives {after.outputs} in place of {list(roots)}")
    source = next((root.source for root in roots if root.source.frames), Source())
    for _, op in after.walk():
        op.source = source
    return Rewrite(rule, numerics, extract_between(operands, roots), after, source, budget)


class _Rewriting:
    """One run of rules over one graph."""

    def __init__(self, graph: Graph, rules: Sequence[RewriteRule], counter: RewriteCounter):
        self.graph, self.counter = graph, counter
        self.editor = Editor(graph)
        self.rules = [(rule, rule.pattern.heads) for rule in rules]
        self.generation: dict[Op, int] = {}
        self.misses: dict[tuple[str, Op], tuple[Remark, frozenset[Op]]] = {}

    def run(self) -> PassResult:
        rewrites: list[Rewrite] = []
        todo = deque(op for op in reversed(self.graph.ops) if len(op.results) == 1)
        while todo and not self.counter.is_exhausted:
            op = todo.popleft()
            if op in self.editor.dead:
                continue
            for rule, heads in self.rules:
                if heads is not None and not _may_match(op, heads):
                    continue
                found = self._try(rule, op)
                if found is not None:
                    rewrite, new = found
                    rewrites.append(rewrite)
                    todo.extendleft(o for o in new if len(o.results) == 1)
                    break
        self.editor.finish()
        alive = set(self.graph.ops)
        told = [remark for remark, inside in self.misses.values() if inside <= alive]  # the rest matched after all
        return PassResult(len(rewrites), tuple(told), tuple(rewrites))

    def _try(self, rule: RewriteRule, op: Op) -> tuple[Rewrite, list[Op]] | None:
        """Tries one rule at one operation."""
        root = op.result
        dims, trail = fresh(root.shape), Trail()
        reasons: list[tuple[str, frozenset[Op]]] = []
        for state in rule.pattern.match(View(root, dims), State(trail=trail)):
            match = Match(root, dims, state)
            if not _reads_each_once(match):
                continue
            roots = [root] if rule.other is None else [root, match.value(rule.other)]
            operands = _operands(match, roots)
            reason = rule.legality(match) or rule.profitability(match)
            if reason is None and not state.inside <= self.editor.dying(roots, operands):
                reason = "a value inside is read elsewhere too"
            if reason is not None:
                reasons.append((reason, state.inside))
            elif self.counter.allows(rule.name, root.source):
                return self._make(rule, match, operands, roots)
            else:
                return None
        if reasons:
            reason, inside = reasons[0]
            self.misses.setdefault((rule.name, op), (Remark.at(op, f"{rule.name}: {reason}"), inside))
        elif trail.op is not None and rule.landmarks and _is_near(rule, trail):
            remark = Remark.at(trail.op, f"{rule.name}: {trail.reason}")
            self.misses.setdefault((rule.name, trail.op), (remark, trail.inside))
        return None

    def _make(
        self, rule: RewriteRule, match: Match, operands: list[Value], roots: list[Value]
    ) -> tuple[Rewrite, list[Op]]:
        def compute(*arrays: Any) -> list[Any]:
            out = rule.build(Builder(match, dict(zip(operands, arrays, strict=True))))
            return list(out) if isinstance(out, (tuple, list)) else [out]

        generation = 1 + max((self.generation.get(op, 0) for op in match.state.inside), default=0)
        if generation > MAX_GENERATIONS:
            raise RuntimeError(
                f"rule {rule.name} matches what rewrites made, again and again, at {match.root.source.short}: its "
                f"replacement must not match a rule of the same set"
            )
        rewrite = make_rewrite(rule.name, rule.numerics, compute, operands, roots, rule.budget)
        new = self.editor.replace(rewrite, operands, roots)
        self.generation.update(dict.fromkeys(new, generation))
        return rewrite, new


def _is_near(rule: RewriteRule, trail: Trail) -> bool:
    """Whether a search came so far that a reader would call it a miss."""
    names = {op.name for op in trail.inside}
    return all(names & any_of for any_of in rule.landmarks)


def _may_match(op: Op, heads: frozenset[str]) -> bool:
    """Whether an operation may be the root of a match: of the right name, or a cast of one that is."""
    if op.name in heads:
        return True
    behind = op.operands[0].op if op.name in _VIEWS else None
    return behind is not None and behind.name in heads


def _reads_each_once(match: Match) -> bool:
    """Whether no value has one axis twice: two axes of the result found equal would be a diagonal."""
    views = [match.dims, *(view.dims for view in match.state.captures.values())]
    flat = [match.axes.flat(dims) for dims in views]
    return all(len(set(axes)) == len(axes) for axes in flat)


def _operands(match: Match, roots: Sequence[Value]) -> list[Value]:
    """Captured values that the replacement is made of."""
    values = [view.value for view in match.state.captures.values() if view.value.const is None]
    return [value for value in dict.fromkeys(values) if value not in roots]
