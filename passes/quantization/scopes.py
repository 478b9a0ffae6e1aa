"""What parameters alone determine, in a graph and in the bodies of its loops.

Knows no quantization. The one idea: a body's input is determined by parameters when the operand that it stands for is,
unless it is a carry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from passes import compat
from passes.graph import Graph, Op, Value
from passes.regions import Role, Slot, has_roles, slots

_UNCHANGING = (Role.CONST, Role.COND_CONST, Role.SCANNED)


@dataclass(frozen=True)
class Origin:
    """What a static value is made of.

    Attributes:
      parameters: The inputs of the program that determine it, in the program's order.
      is_random: A random generator took part.
    """

    parameters: tuple[Value, ...] = ()
    is_random: bool = False


@dataclass(eq=False)
class Scope:
    """A graph, or the body of a loop in it.

    Attributes:
      static: What parameters and constants alone determine, with its origin.
      owner: The operation whose body it is; None for the program.
      slots: For a body, how its inputs correspond to operands of the owner.
    """

    graph: Graph
    static: Mapping[Value, Origin]
    owner: Op | None = None
    parent: Scope | None = None
    slots: Mapping[Value, Slot] | None = None

    @property
    def is_in_scans_alone(self) -> bool:
        """Whether nothing but loops of known length stand around it, which run it every time."""
        scope = self
        while scope.owner is not None and scope.parent is not None:
            if scope.owner.name != "scan":
                return False
            scope = scope.parent
        return True

    def is_static(self, value: Value) -> bool:
        return value.const is not None or value in self.static

    def inner(self, op: Op) -> Iterator[Scope]:
        """The bodies of one of its operations."""
        if not has_roles(op):
            return
        found = slots(op)
        for region in op.regions:
            mine = {value: slot for slot in found for owner, value in slot.inputs if owner is region}
            given = {
                value: self.static.get(slot.operand, Origin())
                for value, slot in mine.items()
                if slot.role in _UNCHANGING and self.is_static(slot.operand)
            }
            yield Scope(region, infer_static(region, given), op, self, mine)


def program_scope(graph: Graph) -> Scope:
    """The scope of a program, whose inputs with a path are the parameters."""
    return Scope(graph, infer_static(graph, {v: Origin((v,)) for v in graph.inputs if v.path is not None}))


def walk_scopes(scope: Scope) -> Iterator[Scope]:
    """A scope and those inside it."""
    yield scope
    for op in scope.graph.ops:
        for inner in scope.inner(op):
            yield from walk_scopes(inner)


def infer_static(graph: Graph, given: Mapping[Value, Origin]) -> dict[Value, Origin]:
    """The values of a graph that some of its inputs, and constants, alone determine."""
    static = dict(given)
    for op in graph.ops:
        if op.effects or not all(v.const is not None or v in static for v in op.operands):
            continue
        origins = [static[v] for v in op.operands if v in static]
        parameters = dict.fromkeys(p for origin in origins for p in origin.parameters)
        is_random = op.name.startswith(("random_", "threefry", "rng_")) or any(origin.is_random for origin in origins)
        is_random = is_random or any(compat.is_extended_dtype(v.dtype) for v in op.operands)
        origin = Origin(tuple(parameters), is_random)
        static.update(dict.fromkeys(op.results, origin))
    return static
