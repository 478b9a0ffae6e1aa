"""What a compiled program computes and moves, counted from the text of its module: our own walk.

XLA's own `cost_analysis` counts a loop's body once and a gathered table whole. Here bodies of loops are multiplied by
their trip counts, conditionals cost their dearest branch, fusions and calls are followed, and bytes are those that a
kernel (an instruction or a fusion) reads from and writes to memory, so that neither a mask over full scores nor work
in a loop looks like less than it is. Of a program for several devices the counts are those of one.

The one idea: the text of the module is the same interface in every version of JAX.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgpt_jax.compiler.compiled_cost_flops import dot_flops, elementwise_flops, library_name
from fastgpt_jax.compiler.compiled_cost_native import native_cost
from fastgpt_jax.compiler.compiled_cost_traffic import (
    FREE,
    Kernel,
    bytes_asked,
    fused_kernel,
    lone_kernel,
    produced,
)
from fastgpt_jax.compiler.compiled_cost_trips import trip_count
from fastgpt_jax.compiler.hlo_text import Computation, Instruction, Module, nbytes, parse_module, size

COLLECTIVES = frozenset(
    "all-gather all-reduce all-to-all collective-broadcast collective-permute ragged-all-to-all reduce-scatter".split()
)


@dataclass(frozen=True)
class CompiledCost:
    """Counts of one run.

    Attributes:
      dot_flops: Of products, two a multiply-add.
      elementwise_flops: Of all else, one an element.
      bytes_read: From memory, an operand once a kernel.
      bytes_written: To memory; of an update in place the update alone.
      collectives: Kind -> bytes, the larger of what a device gives and gets.
      libraries: What XLA has not generated the code of (custom calls, fusions that a library runs, products by
        themselves) -> number of runs.
      unknown_loops: Loops whose trips are not known; their bodies count once.
    """

    dot_flops: int = 0
    elementwise_flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    collectives: Mapping[str, int] = field(default_factory=dict)
    libraries: Mapping[str, int] = field(default_factory=dict)
    unknown_loops: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Of products and all else."""
        return self.dot_flops + self.elementwise_flops

    @property
    def nbytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    def __add__(self, other: CompiledCost) -> CompiledCost:
        return CompiledCost(
            self.dot_flops + other.dot_flops,
            self.elementwise_flops + other.elementwise_flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            Counter(self.collectives) + Counter(other.collectives),
            Counter(self.libraries) + Counter(other.libraries),
            tuple(dict.fromkeys((*self.unknown_loops, *other.unknown_loops))),
        )

    def times(self, count: int) -> CompiledCost:
        """The cost of doing this `count` times."""
        return CompiledCost(
            self.dot_flops * count,
            self.elementwise_flops * count,
            self.bytes_read * count,
            self.bytes_written * count,
            {kind: number * count for kind, number in self.collectives.items()},
            {name: number * count for name, number in self.libraries.items()},
            self.unknown_loops,
        )


def compiled_cost(compiled: Any) -> CompiledCost:
    """The cost of one run of a compiled program.

    Args:
      compiled: A `jax.stages.Compiled`, or the text of its module.

    Raises:
      UserError: The text is no HLO module.
    """
    module = parse_module(compiled if isinstance(compiled, str) else compiled.as_text() or "")
    return _Walk(module).computation(module.entry)


class _Walk:
    """The walk over one module; a computation that several instructions call is counted once and kept."""

    def __init__(self, module: Module):
        self._module = module
        self._known: dict[str, CompiledCost] = {}

    def computation(self, computation: Computation) -> CompiledCost:
        if computation.name not in self._known:
            costs = (self._instruction(computation, x) for x in computation.instructions.values())
            self._known[computation.name] = sum(costs, CompiledCost())
        return self._known[computation.name]

    def _instruction(self, computation: Computation, instruction: Instruction) -> CompiledCost:
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return CompiledCost()
        if opcode == "while":
            return self._loop(computation, instruction)
        if opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [cost for key in keys for cost in self._called(instruction, key)]
            return max(branches, key=lambda cost: (cost.flops, cost.nbytes))
        if opcode in ("call", "async-start"):
            return sum(self._called(instruction, "to_apply" if opcode == "call" else "calls"), CompiledCost())
        if opcode == "fusion":
            return self._fusion(instruction)
        return self._lone(instruction, computation.operands(instruction))

    def _called(self, instruction: Instruction, key: str) -> list[CompiledCost]:
        return [self.computation(self._module.computations[name]) for name in instruction.called(key)]

    def _loop(self, computation: Computation, loop: Instruction) -> CompiledCost:
        (condition,), (body,) = self._called(loop, "condition"), self._called(loop, "body")
        trips = trip_count(self._module, computation, loop)
        if trips is None:
            return condition + body + CompiledCost(unknown_loops=(loop.name,))
        return condition.times(trips + 1) + body.times(trips)

    def _fusion(self, fusion: Instruction) -> CompiledCost:
        body = self._module.computations[fusion.called("calls")[0]]
        kernel = fused_kernel(self._module, body)
        return self._flops_inside(body, kernel, library_name(fusion)) + CompiledCost(
            bytes_read=bytes_asked(kernel, body.parameters), bytes_written=kernel.written
        )

    def _flops_inside(self, body: Computation, kernel: Kernel, library: str | None) -> CompiledCost:
        """FLOPs of a fusion: elementwise work for what is asked for, products whole."""
        dots, elementwise, names = 0, 0, Counter[str]([library] if library else [])
        for instruction in body.instructions.values():
            if instruction.opcode == "fusion":
                inner = self._module.computations[instruction.called("calls")[0]]
                cost = self._flops_inside(inner, fused_kernel(self._module, inner), None)
                dots, elementwise = dots + cost.dot_flops, elementwise + cost.elementwise_flops
                continue
            operands, whole = body.operands(instruction), max(1, size(instruction.type))
            of_dot, of_all = dot_flops(instruction, operands), elementwise_flops(self._module, instruction, operands)
            is_whole = instruction.opcode == "scatter"  # in place, it is asked for nothing and does all it does
            dots += of_dot
            elementwise += of_all if is_whole else -(-of_all * kernel.asked[instruction.name] // whole)
            if of_dot and not library:
                names[library_name(instruction) or instruction.opcode] += 1
        return CompiledCost(dots, elementwise, libraries=names)

    def _lone(self, instruction: Instruction, operands: list[Instruction]) -> CompiledCost:
        kernel = lone_kernel(self._module, instruction, operands)
        kind = instruction.opcode.removesuffix("-start")
        given, got = sum(nbytes(x.type) for x in operands), nbytes(produced(instruction))
        library = library_name(instruction)
        native = native_cost(instruction, operands)
        if native is not None:
            return CompiledCost(**dataclasses.asdict(native), libraries={library: 1} if library else {})
        return CompiledCost(
            dot_flops(instruction, operands),
            elementwise_flops(self._module, instruction, operands),
            bytes_asked(kernel, operands),
            kernel.written,
            {kind: max(given, got)} if kind in COLLECTIVES else {},
            {library: 1} if library else {},
        )
