"""Native kernels as `select` chooses them: where they run, that a wrong one is caught, what is said without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.compiler import cpu_kernels
from fastgpt_jax.compiler.kernel_choice import TABLE, target_notes, target_passes
from fastgpt_jax.compiler.quantization import make_pipeline
from fastgpt_jax.kernels.cpu import dot, library
from passes.manager import PassManager
from passes.select import Target, deselect
from passes.simplify import simplify
from passes.transform import name_parameters
from passes.validation import InvalidRewrite
from tests.passes.graphs import names, read, run

CPU = Target("cpu")
native = pytest.mark.skipif(library.unusable_reason() is not None, reason=str(library.unusable_reason()))
PIPELINE = "simplify,rms_norm,gated_mlp,weight_rows,attend_pages,select"


def layer(params, x):
    """A norm, a gated MLP and the largest numbers of what comes out."""
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * params["norm"]
    x = (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
    return jax.lax.top_k(x, 3)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


PARAMS = {"norm": draw(64), "gate": draw(64, 80) / 8, "up": draw(64, 80) / 8, "down": draw(80, 48) / 8}
X = draw(2, 3, 64)


def rewritten(scheme=None, target=CPU):
    graph = read(layer, PARAMS, X)
    name_parameters(graph, (PARAMS, X), (0,))
    statistics = PassManager(make_pipeline(PIPELINE, scheme, (), target)).run(graph)
    return graph, statistics


@native
@pytest.mark.parametrize(
    "scheme, dots", [(None, "weight_dot.cpu"), ("w8a8", "quantized_dot.cpu"), ("w4a8", "quantized_dot.cpu")]
)
def test_a_layer_runs_by_native_kernels_and_computes_the_same(scheme, dots):
    graph, statistics = rewritten(scheme)
    found = names(graph)
    assert found[dots] == 3 and found["rms_norm.cpu"] == found["gated.cpu"] == found["top_k.cpu"] == 1
    assert all(v.status == "valid" for run in statistics for v in run.validations)
    have, indices = run(graph, PARAMS, X)
    want = layer(PARAMS, X)
    tolerance = {None: 1e-5, "w8a8": 0.05, "w4a8": 0.6}[scheme]
    np.testing.assert_allclose(have, want[0], atol=tolerance)
    if scheme is None:
        np.testing.assert_array_equal(indices, want[1])


@native
def test_what_runs_elsewhere_has_no_native_operation():
    graph, _ = rewritten()
    assert deselect(graph, TABLE) == 6 and not any(name.endswith(".cpu") for name in names(graph))
    simplify(graph)
    np.testing.assert_allclose(run(graph, PARAMS, X)[0], layer(PARAMS, X)[0], atol=1e-5)


@native
def test_a_kernel_that_is_wrong_in_one_channel_is_caught_and_named(monkeypatch):
    right = dot.weight_dot

    def wrong(x, w, *, out_dtype=None):
        out = right(x, w, out_dtype=out_dtype)
        return out.at[..., -1].add(1e-3)

    monkeypatch.setattr(dot, "weight_dot", wrong)
    with pytest.raises(InvalidRewrite, match="weight_dot.cpu"):
        rewritten()


def test_without_kernels_weights_stay_as_they_lie_and_the_cost_is_told(monkeypatch):
    monkeypatch.setattr(library, "unusable_reason", lambda: "no compiler was there")
    graph, _ = rewritten()
    assert not {"weight_dot", "weight_dot.cpu"} & set(names(graph)) and "dot_general" in names(graph)
    assert "no compiler was there" in target_notes(CPU)["cpu_kernels"]
    assert "slower" in target_notes(CPU)["cpu_kernels"]


@pytest.mark.parametrize("target, reason", [(Target("tpu"), "run on cpu"), (Target("cpu", 2), "2 share the work")])
def test_other_targets_are_refused(target, reason):
    assert reason in str(cpu_kernels.refusal(target)) and target_notes(target) == {}
    graph = read(layer, PARAMS, X)
    for name in ("weight_rows", "attend_pages"):
        assert target_passes(target)[name].function(graph).matched == 0
