"""How much a kernel of a compiled module reads and writes: one instruction, or a fusion.

The one idea: elements are asked for from the results backwards. A kernel asks for its whole result, a slice or a gather
asks only for what it takes, and so a fusion that reads a large operand through a slice reads the slice. What is updated
in place is neither asked for nor written again: XLA puts a `copy` where the old value is still needed, and that is
counted where it stands.

Caches are not modelled: an operand is read once a kernel, and never more of it than there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt_jax.compiler.compiled_cost_flops import is_overwriting
from fastgpt_jax.compiler.hlo_text import Array, Computation, Instruction, Module, Type, nbytes, size

FREE = frozenset(
    "add-dependency after-all bitcast constant domain get-dimension-size get-tuple-element opt-barrier parameter "
    "partition-id replica-id tuple".split()
)
"""What moves nothing where it stands by itself."""
_WHOLE = frozenset("all-gather all-to-all convolution custom-call dot fft fusion reduce-window sort while".split())
"""What needs the whole of its operands for any part of its result."""
_UPDATES = ("dynamic-update-slice", "scatter")


@dataclass(frozen=True)
class Kernel:
    """What a kernel touches.

    Attributes:
      asked: Elements of each instruction of a fusion, or of each operand of a lone instruction, that are needed.
      written: Bytes.
    """

    asked: Counter[str]
    written: int


def lone_kernel(module: Module, instruction: Instruction, operands: Sequence[Instruction]) -> Kernel:
    """An instruction outside all fusions."""
    if instruction.opcode in _UPDATES:
        asked, written = _ask_for_update(module, instruction, operands)
    else:
        asked = _ask(instruction, operands, size(instruction.type))
        written = nbytes(produced(instruction))
    return Kernel(Counter({x.name: min(asked[x.name], size(x.type)) for x in operands}), written)


def fused_kernel(module: Module, body: Computation) -> Kernel:
    """A fusion's computation."""
    asked, written = Counter[str](), 0
    for result in _results(body):
        updates = _updates_in_place(body, result)
        if not updates:
            asked[result.name] += size(result.type)
            written += nbytes(result.type)
        for update in updates:
            more, nbytes_written = _ask_for_update(module, update, body.operands(update))
            asked += more
            written += nbytes_written
    for instruction in reversed(list(body.instructions.values())):
        asked[instruction.name] = min(asked[instruction.name], size(instruction.type))
        if asked[instruction.name]:
            asked += _ask(instruction, body.operands(instruction), asked[instruction.name])
    return Kernel(asked, written)


def bytes_asked(kernel: Kernel, values: Sequence[Instruction]) -> int:
    """Bytes read of some values, each once."""
    total = 0
    for value in {x.name: x for x in values}.values():
        whole = size(value.type)
        total += -(-nbytes(value.type) * kernel.asked[value.name] // whole) if whole else 0
    return total


def produced(instruction: Instruction) -> Type:
    """What an instruction makes; the first half of an asynchronous one returns its operands beside it."""
    if isinstance(instruction.type, Array) or not instruction.opcode.endswith("-start"):
        return instruction.type
    return instruction.type[0 if instruction.opcode == "copy-start" else min(1, len(instruction.type) - 1)]


def _ask(instruction: Instruction, operands: Sequence[Instruction], wanted: int) -> Counter[str]:
    """Elements that each operand must give for `wanted` elements of the result."""
    opcode, asked, whole = instruction.opcode, Counter[str](), max(1, size(instruction.type))
    for number, operand in enumerate(operands):
        available = size(operand.type)
        if opcode in _WHOLE:
            needed = available
        elif opcode == "reduce" or (opcode == "gather" and number == 1):
            needed = -(-available * wanted // whole)
        elif opcode in _UPDATES:
            needed = wanted if number == 0 else available
        else:
            needed = wanted
        asked[operand.name] += min(needed, available)
    return asked


def _ask_for_update(module: Module, update: Instruction, operands: Sequence[Instruction]) -> tuple[Counter[str], int]:
    """What an update in place needs, and the bytes it writes: a scatter that combines reads what it adds to."""
    count = 1 if update.opcode == "dynamic-update-slice" else len(operands) // 2
    changed = operands[1:2] if update.opcode == "dynamic-update-slice" else operands[count + 1 :]
    asked = Counter({x.name: size(x.type) for x in operands[count:]})
    if update.opcode == "scatter" and not is_overwriting(module, update):
        for target, values in zip(operands[:count], changed, strict=True):
            asked[target.name] += min(size(values.type), size(target.type))
    written = sum(min(nbytes(x.type), nbytes(y.type)) for x, y in zip(operands[:count], changed, strict=True))
    return asked, written


def _results(body: Computation) -> list[Instruction]:
    if body.root.opcode == "tuple":
        return body.operands(body.root)
    return [body.root]


def _updates_in_place(body: Computation, result: Instruction) -> list[Instruction]:
    """The updates of which a result consists, where what they update is an operand of the fusion; else none."""
    updates = []
    while result.opcode in (*_UPDATES, "bitcast"):
        if result.opcode != "bitcast":
            updates.append(result)
        result = body.instructions[result.operands[0]]
    return updates if result.opcode == "parameter" else []
