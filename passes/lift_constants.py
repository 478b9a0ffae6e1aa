"""Makes large constants of a program inputs of it: what a function closes over is a weight like any other.

A constant is written into every executable that holds it, and compilers try to fold it; an input is stored once and
shared. Matches: constants of a graph's own operations and outputs. Does not match: constants of loop bodies, which JAX
hands to loops as operands; PRNG keys. Must run after: nothing. Numerics: exact.
"""

from __future__ import annotations

import numpy as np

from passes.constants import content_key
from passes.graph import Graph, Value

LARGE_BYTES = 16 * 1024


def lift_constants(graph: Graph, min_bytes: int = LARGE_BYTES) -> list[np.ndarray]:
    """Rewrites in place; returns the constants, one for each input added behind the others."""
    inputs: dict[object, Value] = {}
    constants: list[np.ndarray] = []
    replacements: dict[Value, Value] = {}
    for value in [*(v for op in graph.ops for v in op.operands), *graph.outputs]:
        if value in replacements or not isinstance(value.const, np.ndarray) or value.nbytes < min_bytes:
            continue
        key = content_key(value.const)
        if key not in inputs:
            inputs[key] = Value(value.aval)
            constants.append(value.const)
        replacements[value] = inputs[key]
    graph.inputs.extend(inputs.values())
    graph.replace(replacements)
    return constants
