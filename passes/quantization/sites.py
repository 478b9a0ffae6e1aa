"""Where a program reads weights that could be quantized: products and look-ups of rows with one static operand.

Knows no rule. The one idea: a site is an operation, which of its operands is the weight, and what each dimension of
that is to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from passes.graph import Graph, Op, Value
from passes.ops.stored import stored_p
from passes.quantization.scopes import Origin, Scope, program_scope, walk_scopes
from passes.quantization.views import Canonical, Part, View, canonical_form, is_float, look_through


@dataclass(eq=False)
class Site:
    """An operation that reads a weight.

    Attributes:
      kind: 'dot' or 'gather', as in rules.
      operand: Which operand is the weight.
      obstacle: Why the weight cannot be quantized here, whatever the rules say; None where it can.
    """

    scope: Scope
    op: Op
    kind: str
    operand: int
    view: View
    batch: tuple[int, ...]
    obstacle: str | None

    @property
    def weight(self) -> Value:
        return self.op.operands[self.operand]

    @property
    def origin(self) -> Origin:
        return self.view.scope.static.get(self.view.root, Origin())

    @property
    def paths(self) -> list[str]:
        """Names of the parameters that the weight is made of; what only scales it is left out."""
        parameters = self.origin.parameters
        matrices = [p for p in parameters if p.aval.ndim > 1]
        return [p.path for p in matrices or parameters if p.path is not None]

    def canonical(self) -> Canonical:
        return canonical_form(self.view, self.batch)


def find_sites(graph: Graph) -> list[Site]:
    """All sites of a program, in order. Weights that are quantized already are none, and so are constants of a
    look-up."""
    return [site for scope in walk_scopes(program_scope(graph)) for site in _sites(scope)]


def _sites(scope: Scope) -> Iterator[Site]:
    for op in scope.graph.ops:
        found = None
        if op.name == "dot_general":
            found = _dot(scope, op)
        elif op.name == "gather":
            found = _gather(scope, op)
        if found is not None and not _is_stored(found.view.root):
            yield found


def _is_stored(value: Value) -> bool:
    return value.op is not None and value.op.primitive is stored_p


def _dot(scope: Scope, op: Op) -> Site | None:
    static = [scope.is_static(v) for v in op.operands]
    if static[0] == static[1]:  # two activations, or nothing that a step computes
        return None
    operand = static.index(True)
    weight, x = op.operands[operand], op.operands[1 - operand]
    contracted, batch = (sides[operand] for sides in op.params["dimension_numbers"])
    parts = [
        Part.CONTRACTED if d in contracted else Part.BATCH if d in batch else Part.FREE for d in range(weight.aval.ndim)
    ]
    obstacle = None if is_float(x) else f"its activations are {x.dtype}, not floats"
    return _site(scope, op, "dot", operand, parts, tuple(batch), obstacle)


def _gather(scope: Scope, op: Op) -> Site | None:
    table = op.operands[0]
    if not scope.is_static(table) or scope.is_static(op.operands[1]):
        return None
    fill = op.params["fill_value"]
    is_plain = fill is None or fill == 0 or fill != fill
    obstacle = None if is_plain else f"rows outside its table are filled with {fill}"
    site = _site(scope, op, "gather", 0, _gathered_parts(op), (), obstacle)
    return site if site.paths else None  # constants alone: nothing to quantize


def _gathered_parts(op: Op) -> list[Part] | None:
    """None for a look-up that takes anything but whole rows of one axis."""
    numbers, shape, sizes = op.params["dimension_numbers"], op.operands[0].shape, op.params["slice_sizes"]
    if numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
        return None
    (axis,) = numbers.start_index_map
    whole = all(size == (1 if d == axis else shape[d]) for d, size in enumerate(sizes))
    if not whole or tuple(numbers.collapsed_slice_dims) != (axis,):
        return None
    return [Part.FREE if d == axis else Part.CONTRACTED for d in range(len(shape))]


def _site(
    scope: Scope,
    op: Op,
    kind: str,
    operand: int,
    parts: Sequence[Part] | None,
    batch: tuple[int, ...],
    obstacle: str | None,
) -> Site:
    weight = op.operands[operand]
    view = look_through(scope, weight, parts or [Part.FREE] * weight.aval.ndim)
    site = Site(scope, op, kind, operand, view, batch, None)
    site.obstacle = _obstacle(site, parts is not None) or obstacle
    return site


def _obstacle(site: Site, takes_rows: bool) -> str | None:
    if not is_float(site.weight):
        return f"its weight is {site.weight.dtype}, not floats"
    if not site.origin.parameters:
        return "its weight is a constant of the program, not a parameter"
    if site.origin.is_random:
        return "its weight is made by a random generator (PRNG)"
    if not takes_rows:
        return "it takes parts of rows, or rows of several axes"
    if site.view.scope.parent is not None:
        return "its weight is computed inside the loop"
    return None
