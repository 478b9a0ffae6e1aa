"""The pass `select`: for each operation of ours the implementation that its target runs fastest, and why.

Knows no kernel: it is handed a table, operation -> candidates, and asks each whether it declines and what it would
cost. Matches: operations of the table that another candidate than their plain meaning suits best. Does not match: those
whose plain meaning is chosen, which stay what they are. Must run after: whatever looks for these operations. Numerics:
reassociates.

The one idea: a chosen implementation is an operation too, `attention.xla_blocked`, of the same operands and parameters;
so it has a name in every listing, a meaning to be validated by, and a way back. One that is native code has no other
dtypes than its own, so it is validated in those, on an instance of its size class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from passes import compat
from passes.extract import extract_between
from passes.graph import Graph, Op, Value
from passes.numerics import Numerics
from passes.patterns.driver import bodies_of
from passes.result import PassResult, Remark
from passes.rewrite import Rewrite, RewriteCounter

SELECT = "select"
PLAIN = "plain"
"""The name of a meaning run as it is written."""
LEAST_GAIN = 0.2
"""The share of the plain meaning's time that another must be estimated to save: it takes longer to compile."""


@dataclass(frozen=True)
class Target:
    """What a program is compiled for.

    Attributes:
      platform: As JAX names it: cpu, tpu, gpu.
      num_devices: Devices that share the program.
    """

    platform: str
    num_devices: int = 1


def _nothing(op: Op, target: Target) -> None:
    return None


@dataclass(frozen=True)
class Instance:
    """An operation alone, on operands of other shapes.

    Attributes:
      operands: Shapes and dtypes of what is drawn at random, arrays in the place of what is fixed.
      params: In place of the operation's.
    """

    operands: Sequence[Any]
    params: Mapping[str, Any]

    def graph(self, op: Op) -> Graph:
        """A graph of the operation alone, as it now is."""
        inputs, operands = list[Value](), list[Value]()
        for given in self.operands:
            aval = compat.shaped(given.shape, given.dtype)
            value = Value(aval, const=given) if isinstance(given, np.ndarray) else Value(aval)
            operands.append(value)
            inputs += [] if value.const is not None else [value]
        params = dict(self.params)
        avals = compat.infer_types(op.primitive, [v.aval for v in operands], params) or []
        alone = Op(op.primitive, operands, params, avals, (), op.source, op.effects)
        return Graph(inputs, [alone], list(alone.results))


@dataclass(frozen=True)
class Candidate:
    """One way to run an operation.

    Attributes:
      primitive: The operation it becomes; None for the plain meaning, which stays what it is.
      declines: Why it cannot or must not run an operation there, or None.
      seconds: What a run is estimated to take there; None where nothing was measured.
      is_portable: Whether it lowers to operations that every platform has.
      budget: For native code, the largest relative error of an operation's result in its own dtypes; None for what can
        be widened.
      shrink: For native code, a small instance of an operation, on which it is validated; None validates it whole.
    """

    name: str
    primitive: Any = None
    declines: Callable[[Op, Target], str | None] = _nothing
    seconds: Callable[[Op, Target], float | None] = _nothing
    is_portable: bool = True
    budget: Callable[[Op], float] | None = None
    shrink: Callable[[Op], Instance] | None = None


Table = Mapping[str, Sequence[Candidate]]
"""Name of an operation -> its candidates, the preferred first; where none takes it the plain meaning runs."""


def make_implementation(op: Any, name: str, implement: Callable[..., Any]) -> Any:
    """An operation `<op>.<name>` of the operands and parameters of `op`, run by `implement(*operands, **params)`."""
    full_name = f"{op.name}.{name}"

    def run(*operands: Any, **params: Any) -> Any:
        with jax.named_scope(full_name):
            return implement(*operands, **params)

    def abstract(*operands: Any, **params: Any) -> Any:
        types = compat.infer_types(op, operands, params)
        return types if op.multiple_results or types is None else types[0]

    primitive = compat.make_primitive(full_name, run, abstract, multiple_results=op.multiple_results)
    setattr(primitive, "stands_for", op)  # noqa: B010 - an attribute of ours on JAX's object
    return compat.derive_rules(primitive)


def make_native_implementation(op: Any, name: str, call: Callable[..., Any]) -> Any:
    """As `make_implementation`, for `call(*operands, **params)` in native code: its meaning stays that of `op`.

    Args:
      op: An operation of ours, or of JAX.
    """
    full_name = f"{op.name}.{name}"

    def run(*operands: Any, **params: Any) -> Any:
        with jax.named_scope(full_name):
            return call(*operands, **params)

    meaning = compat.meaning_of(op) or functools.partial(compat.apply, op)

    def abstract(*operands: Any, **params: Any) -> Any:
        types = compat.infer_types(op, operands, params)
        return types if op.multiple_results or types is None else types[0]

    primitive = compat.make_primitive(full_name, meaning, abstract, multiple_results=op.multiple_results)
    setattr(primitive, "stands_for", op)  # noqa: B010 - an attribute of ours on JAX's object
    return compat.run_natively(compat.derive_rules(primitive), run)


def select(graph: Graph, counter: RewriteCounter | None = None, *, table: Table, target: Target) -> PassResult:
    """Rewrites in place, loop bodies too; every decision is told."""
    counter = counter or RewriteCounter()
    result = PassResult()
    for body in bodies_of(graph):
        for op in body.ops:
            if op.name not in table or counter.is_exhausted:
                continue
            chosen, reason = choose(op, table[op.name], target)
            told = (Remark.at(op, reason),)
            if chosen is None or chosen.primitive is None:
                result += PassResult(notes=told)
            elif counter.allows(f"{op.name}.{chosen.name}", op.source):
                result += PassResult(1, rewrites=(_become(op, chosen),), notes=told)
    return result


def choose(op: Op, candidates: Sequence[Candidate], target: Target) -> tuple[Candidate | None, str]:
    """The candidate for an operation, None where all decline, and the reasons in one line."""
    reasons = {c.name: c.declines(op, target) for c in candidates}
    able = [c for c in candidates if reasons[c.name] is None]
    declined = [f"{name} declines: {reason}" for name, reason in reasons.items() if reason is not None]
    if not able:
        return None, "; ".join([f"runs as {PLAIN}", *declined])
    costs = {c.name: c.seconds(op, target) for c in able}
    known = {name: cost for name, cost in costs.items() if cost is not None}
    best = min(able, key=lambda c: _weighed(c, known[c.name])) if len(known) == len(able) else able[0]
    why = [f"runs as {best.name}"]
    if len(able) > 1 and len(known) == len(able):
        why[0] += f", estimated {_time(known[best.name])}"
        why += [f"{c.name} would take {_time(known[c.name])}" for c in able if c is not best]
    elif len(able) > 1:
        why[0] += f", preferred on {target.platform}"
        why += [f"{c.name} comes after it" for c in able if c is not best]
    return best, "; ".join([*why, *declined])


def _weighed(candidate: Candidate, seconds: float) -> float:
    return seconds if candidate.primitive is None else seconds / (1 - LEAST_GAIN)


def unportable(graph: Graph, table: Table) -> list[Op]:
    """The operations that run on one platform alone."""
    bound = {c.primitive for candidates in table.values() for c in candidates if not c.is_portable}
    return [op for _, op in graph.walk() if op.primitive in bound]


def deselect(graph: Graph, table: Table) -> int:
    """Puts back the operations that chosen ones stand for where these need a platform of their own; how many."""
    back = unportable(graph, table)
    for op in back:
        op.primitive = op.primitive.stands_for
    return len(back)


def _become(op: Op, chosen: Candidate) -> Rewrite:
    small = None if chosen.shrink is None else chosen.shrink(op)
    budget = None if chosen.budget is None else chosen.budget(op)
    operands = list(dict.fromkeys(v for v in op.operands if v.const is None))

    def taken() -> Graph:
        return extract_between(operands, op.results) if small is None else small.graph(op)

    before = taken()
    op.primitive = chosen.primitive
    return Rewrite(chosen.primitive.name, Numerics.REASSOCIATES, before, taken(), op.source, budget)


def _time(seconds: float) -> str:
    """Two digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
