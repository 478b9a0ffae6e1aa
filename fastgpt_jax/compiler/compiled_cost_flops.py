"""FLOPs of one instruction of a compiled module, products and elementwise work apart.

Conventions, those of `passes/cost.py`: a multiply-add is two; an elementwise operation is one an output element,
transcendental or not; a reduction one an element that goes in; data movement none. Knows no control flow: what an
instruction calls is the walk's business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from fastgpt_jax.compiler.hlo_text import Array, Instruction, Module, arrays, size

MOVEMENT = frozenset(
    "add-dependency after-all bitcast bitcast-convert broadcast concatenate constant convert copy copy-done copy-start "
    "domain dynamic-reshape dynamic-slice dynamic-update-slice gather get-dimension-size get-tuple-element infeed iota "
    "opt-barrier outfeed pad parameter partition-id recv recv-done replica-id reshape reverse select send send-done "
    "set-dimension-size slice transpose tuple".split()
)
"""What computes nothing."""
_BY_INPUT = frozenset("reduce select-and-scatter".split())
UNCOUNTED = frozenset("cholesky triangular-solve rng-get-and-update-state custom-call".split())
"""What may compute something that is not counted."""
_DOT_CALLS = re.compile(r"\$(gemm|matmul)")


def dot_flops(instruction: Instruction, operands: Sequence[Instruction]) -> int:
    """Two for each multiply-add of a product or convolution, called from a library or not; 0 for anything else."""
    if instruction.opcode == "dot":
        return _dot(instruction.array, operands[0].array, instruction.numbers("lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands[1].array)
    if instruction.opcode == "custom-call":
        return _library_dot(instruction, operands)
    return 0


def elementwise_flops(module: Module, instruction: Instruction, operands: Sequence[Instruction]) -> int:
    """Of everything but products, for the whole result."""
    opcode = instruction.opcode
    if opcode in MOVEMENT or opcode in ("dot", "convolution") or opcode in UNCOUNTED:
        return _top_k(instruction, operands) if instruction.attributes.get("custom_call_target") == '"TopK"' else 0
    if opcode in _BY_INPUT:
        return operands[0].array.size
    if opcode == "reduce-window":
        return instruction.array.size * _window_size(instruction)
    if opcode == "scatter":
        return 0 if is_overwriting(module, instruction) else size(operands[-1].type)
    if opcode == "sort":
        length = operands[0].array.shape[instruction.numbers("dimensions")[0]]
        return operands[0].array.size * _log2(length)
    if opcode == "fft":
        return 5 * instruction.array.size * _log2(math.prod(instruction.numbers("fft_length")))
    return max((array.size for array in arrays(instruction.type)), default=0)


def library_name(instruction: Instruction) -> str | None:
    """What runs an instruction where XLA has not generated its code: a custom call's target or a library's fusion."""
    if instruction.opcode == "custom-call":
        return instruction.attributes.get("custom_call_target", '"custom-call"').strip('"')
    if instruction.opcode == "fusion" and instruction.attributes.get("kind") == "kCustom":
        found = re.search(r'"kind":"([^"]+)"', instruction.attributes.get("backend_config", ""))
        return found[1] if found else "kCustom"
    if instruction.opcode in ("dot", "convolution"):
        return instruction.opcode
    return None


def is_overwriting(module: Module, scatter: Instruction) -> bool:
    """Whether a scatter puts its updates in the place of what was there, instead of combining the two."""
    combine = scatter.called("to_apply")
    return bool(combine) and module.computations[combine[0]].root.opcode == "parameter"


def _dot(result: Array, left: Array, contracted: Sequence[int]) -> int:
    return 2 * result.size * math.prod(left.shape[d] for d in contracted)


def _convolution(instruction: Instruction, kernel: Array) -> int:
    labels = instruction.attributes["dim_labels"]  # as in b01f_01io->b01f
    outputs = labels.split("_")[1].split("->")[0].index("o")
    return 2 * instruction.array.size * (kernel.size // max(1, kernel.shape[outputs]))


def _library_dot(instruction: Instruction, operands: Sequence[Instruction]) -> int:
    """A product by a library, which says in its configuration what it contracts, or contracts the last axis."""
    name = library_name(instruction) or ""
    if not _DOT_CALLS.search(name) or not operands:
        return 0
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes.get("backend_config", ""))
    left = operands[0].array
    contracted = [int(json.loads(n)) for n in found[1].split(",")] if found and found[1] else [len(left.shape) - 1]
    return _dot(instruction.array, left, contracted)


def _top_k(instruction: Instruction, operands: Sequence[Instruction]) -> int:
    return operands[0].array.size * _log2(instruction.array.shape[-1])


def _window_size(instruction: Instruction) -> int:
    found = re.search(r"size=([\dx]+)", instruction.attributes.get("window", ""))
    return math.prod(map(int, found[1].split("x"))) if found else 1


def _log2(length: int) -> int:
    return max(1, math.ceil(math.log2(max(length, 2))))
