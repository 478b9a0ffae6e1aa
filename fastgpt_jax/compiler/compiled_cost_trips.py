"""How often the body of a compiled loop runs.

XLA mostly says so itself. Where it does not, a counter is looked for: an element of the carried tuple that starts as a
constant, grows by a constant, and is compared with a constant. Anything else is not known, and None.
"""

from __future__ import annotations

import re

from fastgpt_jax.compiler.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SWAPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}
Place = tuple[Computation, Instruction]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trips of a `while` of `computation`."""
    known = _KNOWN.search(loop.attributes.get("backend_config", "").replace(" ", ""))
    if known is not None:
        return int(known[1])
    found = _comparison(module, loop)
    if found is None:
        return None
    index, direction, stop = found
    start, step = _start(computation, loop, index), _step(module, loop, index)
    if start is None or not step:
        return None
    return _count(start, stop, step, direction)


def _count(start: int, stop: int, step: int, direction: str) -> int | None:
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(stop - start + (direction == "LE")) // step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, -(-(start - stop + (direction == "GE")) // -step))
    if direction == "NE" and (stop - start) % step == 0 and (stop - start) // step >= 0:
        return (stop - start) // step
    return None


def _comparison(module: Module, loop: Instruction) -> tuple[int, str, int] | None:
    """The carried element that is compared, how, and with what."""
    condition = module.computations[loop.called("condition")[0]]
    (body, compare), caller = _inside(module, condition, condition.root)
    if compare.opcode != "compare":
        return None
    sides = [_outside(condition, _through(body, x), caller) for x in body.operands(compare)]
    indices, constants = [_index(condition, x) for x in sides], [_constant(x) for x in sides]
    direction = compare.attributes.get("direction", "")
    if indices[0] is not None and constants[1] is not None:
        return indices[0], direction, constants[1]
    if indices[1] is not None and constants[0] is not None:
        return indices[1], _SWAPPED.get(direction, ""), constants[0]
    return None


def _start(computation: Computation, loop: Instruction, index: int) -> int | None:
    carried = computation.instructions[loop.operands[0]]
    if carried.opcode != "tuple":
        return None
    return _constant(_through(computation, computation.operands(carried)[index]))


def _step(module: Module, loop: Instruction, index: int) -> int | None:
    """By how much the body changes a carried element, where that is a constant."""
    outer = module.computations[loop.called("body")[0]]
    if outer.root.opcode != "tuple":
        return None
    (body, change), caller = _inside(module, outer, _through(outer, outer.operands(outer.root)[index]))
    if change.opcode not in ("add", "subtract"):
        return None
    left, right = (_outside(outer, _through(body, x), caller) for x in body.operands(change))
    if _index(outer, left) == index and _constant(right) is not None:
        return _constant(right) if change.opcode == "add" else -(_constant(right) or 0)
    return _constant(left) if change.opcode == "add" and _index(outer, right) == index else None


def _inside(module: Module, computation: Computation, value: Instruction) -> tuple[Place, Instruction | None]:
    """What makes a value, inside the fusion that wraps it where one does."""
    if value.opcode not in ("fusion", "call"):
        return (computation, value), None
    body = module.computations[value.called("calls" if value.opcode == "fusion" else "to_apply")[0]]
    return (body, _through(body, body.root)), value


def _outside(computation: Computation, value: Instruction, caller: Instruction | None) -> Instruction:
    """What a caller gives for a parameter of the fusion it calls."""
    if caller is None or value.opcode != "parameter":
        return value
    return _through(computation, computation.operands(caller)[int(value.literal)])


def _through(computation: Computation, value: Instruction) -> Instruction:
    """What a value is a copy of."""
    while value.opcode in ("copy", "bitcast", "convert"):
        value = computation.operands(value)[0]
    return value


def _index(computation: Computation, value: Instruction) -> int | None:
    """Which carried element a value is."""
    if value.opcode != "get-tuple-element" or value.name not in computation.instructions:
        return None
    is_carried = computation.operands(value)[0].opcode == "parameter"
    return value.numbers("index")[0] if is_carried else None


def _constant(value: Instruction) -> int | None:
    """A whole number known while compiling."""
    if value.opcode != "constant" or not re.fullmatch(r"-?\d+", value.literal):
        return None
    return int(value.literal)
