"""Passes called exact change no bit of a served step, each operation run by itself, behind rounded caches too.

What a compiled step computes may differ all the same: XLA fuses another program otherwise, and a last bit decides which
way a number is rounded.
"""

import dataclasses

import jax
import numpy as np
import pytest

from fastgpt_jax.compiler.capture import as_forward, capture
from fastgpt_jax.compiler.compile import leaf_paths
from fastgpt_jax.compiler.program import make_program
from fastgpt_jax.compiler.quality import trace_logits
from fastgpt_jax.models import Llama
from passes.extract import clone
from passes.graph import Graph
from passes.incremental.derive import derive
from passes.incremental.row_format import ROW_FORMATS
from passes.manager import PassManager, PassOptions
from passes.numerics import Numerics
from passes.reader import trace
from passes.registry import PASSES
from passes.replay import evaluate
from tests.filled_model import make_filled_model
from tests.passes.sparse_attention.test_served import LLAMA

EXACT = [name for name, entry in PASSES.items() if entry.numerics is Numerics.EXACT]
QUIET = PassOptions(is_validating=False)


@pytest.fixture(scope="module")
def step() -> tuple[Graph, list]:
    """The step over whole texts, with int8 caches, and its arguments."""
    forward, params = as_forward(make_filled_model(Llama, LLAMA), None)
    captured = capture(forward, params, 12)
    plan = derive(captured.graph, captured.times, captured.token_input)
    program = make_program(captured.graph, plan, num_slots=2, unroll=True)
    graph = trace_logits(dataclasses.replace(program, row_format=ROW_FORMATS["int8"]), leaf_paths(params), 2, 8)
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, 8), dtype=np.int32)
    return graph, [*jax.tree.leaves(params), tokens, np.full(2, 8, np.int32)]


def bits(graph: Graph, arguments: list) -> np.ndarray:
    (logits,) = evaluate(graph, arguments)
    return np.asarray(logits).view(np.uint32)


@pytest.fixture(scope="module")
def written(step) -> np.ndarray:
    return bits(*step)


def test_there_are_exact_passes():
    assert {"simplify", "canonicalize", "cse", "dce", "residual_norm"} <= set(EXACT)


@pytest.mark.parametrize("name", ["simplify", *(pytest.param(n, marks=pytest.mark.slow) for n in EXACT)])
def test_an_exact_pass_changes_no_bit_of_a_step_with_rounded_caches(name, step, written):
    graph, arguments = clone(step[0]), step[1]
    (run,) = PassManager([PASSES[name]], QUIET).run(graph)
    assert run.result.matched or name in ("residual_norm", "cse")
    assert "int8" in {str(v.dtype) for _, op in graph.walk() for v in op.results}
    np.testing.assert_array_equal(bits(graph, arguments), written)


def test_a_last_bit_would_show(step, written):
    graph, arguments = clone(step[0]), step[1]
    norm = next(op for op in graph.ops if op.name == "rsqrt")
    (value,) = norm.operands
    wrong, _ = trace(lambda x: x * np.float32(1 + 2**-23), jax.ShapeDtypeStruct(value.shape, value.dtype))
    wrong.replace({wrong.inputs[0]: value})
    at = graph.ops.index(norm)
    graph.ops[at:at] = wrong.ops
    norm.operands = [wrong.outputs[0]]
    assert (bits(graph, arguments) != written).any()
