"""What a call of a native CPU kernel computes and moves, from its operands and attributes.

The one idea: a kernel reads and writes each of its operands and results once, but for pools of caches, of which it
touches the rows that the step writes and, of each request, the rows that it may read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt_jax.compiler.hlo_text import Array, Instruction, arrays, nbytes
from fastgpt_jax.kernels.cpu.library import TARGET_PREFIX

_PER_NUMBER = {"norm": 5, "gated": 5, "rope": 3}
"""Elementwise FLOPs a number of the first result."""


@dataclass(frozen=True)
class NativeCost:
    """Counts of one call; see `CompiledCost`."""

    dot_flops: int
    elementwise_flops: int
    bytes_read: int
    bytes_written: int


def native_cost(instruction: Instruction, operands: Sequence[Instruction]) -> NativeCost | None:
    """The cost of an instruction that calls a native kernel; None for all others."""
    target = instruction.attributes.get("custom_call_target", "").strip('"')
    if instruction.opcode != "custom-call" or not target.startswith(TARGET_PREFIX):
        return None
    kernel, results = target.removeprefix(TARGET_PREFIX), list(arrays(instruction.type))
    read, written = sum(nbytes(x.type) for x in operands), sum(map(nbytes, results))
    dot_flops = 0
    if kernel.endswith("_dot"):
        dot_flops = 2 * results[0].size * operands[0].array.shape[-1]
    elif kernel == "attention":
        dot_flops = _attention_flops(operands[0].array, operands[1].array.shape[1], results[0])
    elif kernel == "paged_attention":
        num_keys = _number(instruction, "num_keys")
        dot_flops = _attention_flops(operands[0].array, num_keys, results[0])
        return NativeCost(dot_flops, 0, *_paged_traffic(operands, results, num_keys))
    return NativeCost(dot_flops, _PER_NUMBER.get(kernel, 0) * results[0].size, read, written)


def _attention_flops(query: Array, num_keys: int, out: Array) -> int:
    return 2 * num_keys * (query.size + out.size)


def _paged_traffic(operands: Sequence[Instruction], results: Sequence[Array], num_keys: int) -> tuple[int, int]:
    """Bytes read and written: results behind the first are pools, and operands of their shapes."""
    pools = results[1:]
    rest = [x.array for x in operands if x.array not in pools]
    num_requests, num_rows = operands[0].array.shape[0], operands[0].array.shape[1]
    keys, row = operands[5].array, operands[1].array.shape[2:]  # [*L, P, Z, *row] and K, H
    num_positions = max(1, keys.size // math.prod(row))
    rows = [num_requests * nbytes(pool) // num_positions for pool in pools]
    read = sum(map(nbytes, rest)) + sum(row * num_keys for row in rows)
    return read, nbytes(results[0]) + sum(row * num_rows for row in rows)


def _number(instruction: Instruction, name: str) -> int:
    found = re.search(rf"\b{name} = (\d+)", instruction.attributes.get("backend_config", ""))
    return int(found[1]) if found else 0
