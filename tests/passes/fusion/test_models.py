"""Hits on models: what every layer has is found in every layer, once, and a second run finds nothing."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fastgpt_jax
import passes
from benchmarks.pass_table import error_between, family_graph, measure, zoo_graph
from fastgpt_jax.artifact.entry_points import EntryPointKey
from passes.extract import clone
from passes.fusion.merge_projections import merge_projections
from passes.manager import PassManager, PassOptions
from passes.registry import parse_pipeline
from passes.simplify import simplify
from tests.compiler import zoo
from tests.models.families import FAMILIES, make_model
from tests.passes.graphs import names

LAYERS = 2
ROTARY = {"rms_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "gated_mlp": LAYERS, "attention": LAYERS}
LEARNED = {"layer_norm": 2 * LAYERS + 1, "attention": LAYERS}
HITS = {
    "llama": ROTARY | {"residual_norm": 2 * LAYERS, "merge_projections": 2 * LAYERS},
    "mistral": ROTARY | {"residual_norm": 2 * LAYERS, "merge_projections": 2 * LAYERS},
    "qwen3": ROTARY | {"rms_norm": 4 * LAYERS + 1, "residual_norm": 2 * LAYERS, "merge_projections": 2 * LAYERS},
    "phi3": ROTARY | {"residual_norm": 2 * LAYERS, "merge_projections": 2 * LAYERS},
    "gemma2": ROTARY | {"rms_norm": 4 * LAYERS + 1, "residual_norm": 2 * LAYERS, "merge_projections": 2 * LAYERS},
    "gemma3": ROTARY | {"rms_norm": 6 * LAYERS + 1, "residual_norm": 2 * LAYERS, "merge_projections": 2 * LAYERS},
    "gpt2": LEARNED | {"residual_norm": 2 * LAYERS + 1, "merge_projections": LAYERS},
    "bloom": LEARNED | {"layer_norm": 2 * LAYERS + 2, "residual_norm": 2 * LAYERS},
}
NARROWED = {"mistral": 2, "phi3": 2, "gemma2": 1, "gemma3": 1}
"""Layers with windows, of which a decode step reads few rows."""
ZOO = "mha fused_qkv gqa_grouped mla_rope rope_half rope_interleaved rope_partial scan_layers bfloat16 linen nnx mamba"


def slowly(values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def hits(statistics):
    """Rewrites by pass; simplifications are not counted."""
    made = Counter()
    for s in statistics:
        if s.name != "simplify":
            made[s.name] += s.result.matched
    return dict(+made)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_decode_steps_of_families(name):
    """Through the compiler's own pipeline, on the step before it is divided by binding time."""
    config = fastgpt_jax.CompileConfig(max_model_len=16, pipeline="fuse")
    traced = fastgpt_jax.compile(make_model(name), None, config).trace(EntryPointKey(2, 2, "greedy", False))
    narrowed = {"narrow_reads": NARROWED[name]} if name in NARROWED else {}
    assert hits(traced.passes) == HITS[name] | narrowed
    assert all(v.status == "valid" for s in traced.passes for v in s.validations)


@pytest.mark.parametrize("name", ["llama", *slowly(["gpt2", "qwen3", "gemma3"])])
def test_a_second_run_changes_nothing(name):
    graph, _ = family_graph(name)
    manager = PassManager(parse_pipeline("fuse"), PassOptions(is_validating=False))
    assert hits(manager.run(graph)) == HITS[name]
    count = names(graph)
    assert all(s.result.matched == 0 for s in manager.run(graph)) and names(graph) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO.split())
def test_zoo_models_compute_the_same(name):
    model = next(m for m in zoo.SERVED if m.name == name)
    graph, arguments = zoo_graph(model)
    simplify(graph)  # by itself, since constants that it folds are rounded to float32
    row = measure(name, graph, arguments)
    assert row.invalid == row.bits == 0 and all(p.error < 1e-9 and p.again == 0 for p in row.passes)
    assert row.passes[-1].left < row.ops


@pytest.mark.slow
def test_a_wrong_rewrite_would_show():
    """The error of the table is one: other epsilons make it large."""
    graph, arguments = family_graph("llama")
    PassManager(parse_pipeline("simplify,rms_norm"), PassOptions(is_validating=False)).run(graph)
    wrong = clone(graph)
    for op in wrong.ops:
        if op.name == "rms_norm":
            op.params["eps"] = 1e-2
    assert error_between(graph, wrong, arguments) > 1e-6


@pytest.mark.parametrize("shards, hits", [(None, 4), (2, 0)])
def test_projections_on_a_mesh_stay_apart(shards, hits):
    graph, _ = family_graph("llama")
    result = merge_projections(graph, num_shards=shards)
    assert result.matched == hits
    assert bool(result.remarks) == (hits == 0) and all("2 devices" in str(r) for r in result.remarks)


PASSES = ("attention", "layer_norm", "rms_norm", "rope", "gated_mlp", "residual_norm", "merge_projections")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", [*PASSES, "fuse"])
def test_gradients_of_a_training_step(family, name):
    """Through `passes.apply`, of the mean loss, for each pass behind those it needs."""
    graphdef, state = nnx.split(make_model(family))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 9)), jnp.int32)

    def loss(state, tokens):
        logits = nnx.merge(graphdef, state)(tokens[:, :-1])
        logp = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], -1))

    before = "simplify,layer_norm,rms_norm," if name == "residual_norm" else "simplify,"
    rewritten = passes.apply(loss, before + name, options=PassOptions(is_validating=False))
    wanted, found = (jax.jit(jax.value_and_grad(fn))(state, tokens) for fn in (loss, rewritten))
    leaves = zip(*(jax.tree.leaves(x) for x in (wanted, found)), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))


@pytest.mark.slow
def test_mapped_over_a_batch():
    graphdef, state = nnx.split(make_model("llama"))
    forward = lambda state, tokens: nnx.merge(graphdef, state)(tokens[None])[0]
    rewritten = passes.apply(forward, "fuse", options=PassOptions(is_validating=False))
    tokens = jnp.arange(12).reshape(2, 6) % 23
    wanted, found = (jax.vmap(fn, (None, 0))(state, tokens) for fn in (forward, rewritten))
    np.testing.assert_allclose(wanted, found, rtol=1e-4, atol=1e-5)


def cut_by_columns(path, shape):
    """Projections into heads and the MLP are cut by columns, those back by rows."""
    name = path.split(".kernel")[0].rpartition(".")[2]
    return {"query": 1, "key": 1, "value": 1, "gate": 1, "up": 1, "output": 0, "down": 0}.get(name)


def test_projections_whose_columns_are_shared_join_in_the_order_of_devices():
    graph, arguments = family_graph("llama")
    before = clone(graph)
    result = merge_projections(graph, num_shards=2, cut_of=cut_by_columns)
    assert result.matched == 4 and not result.remarks
    assert error_between(before, graph, arguments) < 1e-12
    joined = [op for op in graph.ops if op.name == "concatenate" and op.operands[0].shape[1:2] == (2,)]
    assert len(joined) == 4  # [D, devices, columns of one]: no device needs another's columns


@pytest.mark.parametrize(
    ("cut_of", "reason"),
    [
        (lambda path, shape: 0 if "key" in path or "gate" in path else 1, "otherwise than by their outermost columns"),
        (lambda path, shape: None if "key" in path or "gate" in path else 1, "otherwise than by their outermost"),
    ],
)
def test_projections_that_are_shared_in_different_ways_stay_apart(cut_of, reason):
    graph, _ = family_graph("llama")
    result = merge_projections(graph, num_shards=2, cut_of=cut_of)
    assert result.matched == 0 and all(reason in str(remark) for remark in result.remarks)


def test_projections_that_every_device_holds_join_as_on_one():
    graph, _ = family_graph("llama")
    result = merge_projections(graph, num_shards=2, cut_of=lambda path, shape: None)
    assert result.matched == 4
