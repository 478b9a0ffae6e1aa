"""What a compile certifies and caches, and that a wrong derivation does not get past it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastgpt_jax
from fastgpt_jax.compiler import compile as compile_module
from passes.incremental import cut, emit, walk
from passes.incremental.errors import NotServable
from passes.incremental.plan import Recipe
from passes.incremental.roles import Demand, Rows
from passes.incremental.rules import RULES
from tests.compiler import zoo
from tests.compiler.serving import derive_model

BY_NAME = {model.name: model for model in (*zoo.SERVED, *zoo.OPTIONAL)}
QUICK = ("mla_rope", "prefix_lm", "one_length")
LAYERS, HEADS, HEAD_DIM, LATENT, ROPE, FLOAT = 2, 4, 8, 6, 4, 4


def compile_model(model: zoo.ZooModel) -> Any:
    with zoo.jax_defaults():
        fn, params = model.make()
        return fastgpt_jax.compile(fn, params, fastgpt_jax.CompileConfig(max_model_len=model.capacity, max_num_seqs=2))


def served_models() -> Any:
    cases = [pytest.param(m, id=m.name, marks=() if m.name in QUICK else pytest.mark.slow) for m in zoo.SERVED]
    return pytest.mark.parametrize("model", cases)


@served_models()
def test_certificate_of_a_served_model(model: zoo.ZooModel):
    compiled = compile_model(model)
    certificate = compiled.certificate
    assert 0 < certificate.worst_error <= 1e-5  # both sides are widened to float32, bfloat16 models too
    assert certificate.min_first_chunk == compiled.min_first_chunk == model.first_chunk
    assert list(certificate.lengths) == sorted(set(certificate.lengths))
    assert certificate.lengths[-1] == compiled.captured.capacity == model.capacity
    assert len(certificate.lengths) == (1 if model.only_length else 3)
    assert all(model.accepts(length) for length in certificate.lengths)
    assert 0 < certificate.decode_ratio <= 1.2
    assert 0 <= certificate.expansion_flops < certificate.decode_flops
    assert (certificate.expansion_flops > 0) == ("mla" in model.name)  # nothing else expands what is cached
    assert certificate.seconds > 0 and all(s >= 0 for s in compiled.seconds.values())


def cached(name: str) -> Counter:
    """Kinds, shapes and layers of what a model keeps, with how often each occurs."""
    return Counter((e.kind, e.shape, e.layers) for e in derive_model(BY_NAME[name]).program.layout().entries)


KV, KV_GQA = ("kv", (1, HEADS, HEAD_DIM), 1), ("kv", (1, 2, HEAD_DIM), 1)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("mha", {KV: 2 * LAYERS}),
        ("gqa_repeated", {KV_GQA: 2 * LAYERS}),  # before the repeat
        ("mqa_repeated", {("kv", (1, 1, HEAD_DIM), 1): 2 * LAYERS}),
        ("mla", {("kv", (1, LATENT), 1): LAYERS}),  # the latent alone, neither keys nor values
        ("mla_rope", {("kv", (1, LATENT), 1): LAYERS, ("kv", (1, 1, ROPE), 1): LAYERS}),
        ("scan_layers", {("kv", (1, HEADS, HEAD_DIM), LAYERS): 2}),
        ("scan_layers_mla", {("kv", (1, LATENT), LAYERS): 1}),
        ("scan_layers_shared_keys", {KV: 2}),  # taken from outside the loop: once, not once a layer
        ("learned_memory", {KV: 2 * LAYERS}),  # rows of tokens, not those of the memory in front of them
        ("probabilities_reused", {KV: 2 * LAYERS - 1}),
        ("shift_pad", {KV: 2 * LAYERS, ("window", (1, 1, 32), 1): LAYERS}),
        ("shift_roll", {KV: 2 * LAYERS, ("window", (1, 1, 32), 1): LAYERS}),
        ("conv_padding", {KV: 2 * LAYERS, ("window", (3, 1, 32), 1): LAYERS}),
        ("conv_padded_before", {KV: 2 * LAYERS, ("window", (3, 1, 32), 1): LAYERS}),
        ("conv_by_taps", {KV: 2 * LAYERS, ("window", (3, 1, 32), 1): LAYERS}),  # one window, not one a tap
        ("conv_dilated", {KV: 2 * LAYERS, ("window", (6, 1, 32), 1): LAYERS}),
        ("running_mean", {("carry", (1, 1, 32), 1): LAYERS}),
        ("gated_scan", {("carry", (1, 1, 32), 1): 2 * LAYERS}),
        ("gru", {("carry", (1, 32), 1): LAYERS}),
        ("mamba", {("window", (3, 1, 64), 1): LAYERS, ("carry", (1, 32, 6), 1): LAYERS}),
        ("positions_from_padding", {KV: 2 * LAYERS, ("carry", (1, 1), 1): 1}),
    ],
)
def test_what_is_cached(name: str, entries: dict[Any, int]):
    assert cached(name) == Counter(entries)


@pytest.mark.parametrize(
    ("name", "floats_per_layer"),
    [("mha", 2 * HEADS * HEAD_DIM), ("gqa_repeated", 2 * 2 * HEAD_DIM), ("mla", LATENT), ("mla_rope", LATENT + ROPE)],
)
def test_bytes_of_a_token(name: str, floats_per_layer: int):
    assert derive_model(BY_NAME[name]).program.layout().bytes_per_token == LAYERS * floats_per_layer * FLOAT


# ------------------------------------------------------------------------------------------ planted mistakes
def shifted_once_more(name: str) -> Callable[[Any], Recipe]:
    """The rule of an operation, reading each row of its first operand one token too early."""

    def rule(site: Any) -> Recipe:
        recipe = RULES[name](site)
        first, *rest = recipe.operands
        roles = tuple(role.shifted(1) if isinstance(role, Rows) else role for role in first.roles)
        return Recipe([Demand(first.value, roles), *rest], recipe.emit)

    return rule


def refused_as_wrong() -> Any:
    return pytest.raises(NotServable, match="derived step differs from the forward .* first at token [0-9]+ of")


@pytest.mark.slow
def test_certificate_catches_a_shift_off_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(walk, "RULES", {**RULES, "pad": shifted_once_more("pad")})
    with refused_as_wrong():
        compile_model(BY_NAME["shift_only"])


def one_head(params: Any, tokens: Any) -> Any:
    """The least attention there is, since a refusal compiles everything once more in full."""
    x = params["embed"][tokens]
    scores = jnp.where(jnp.tri(tokens.shape[1], dtype=bool), x @ jnp.swapaxes(x @ params["k"], 1, 2), -1e9)
    return jax.nn.softmax(scores) @ x @ params["embed"].T


def test_certificate_catches_a_cache_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch):
    right = emit.kv_update_read

    def stale(pool: Any, layers: Any, rows: Any, positions: Any, pages: Any, *, length: int) -> Any:
        nowhere = np.full(positions.shape, np.iinfo(np.int32).max, np.int32)
        view, _ = right(pool, layers, rows, nowhere, pages, length=length)
        return view, right(pool, layers, rows, positions, pages, length=length)[1]

    monkeypatch.setattr(emit, "kv_update_read", stale)
    keys = jax.random.split(jax.random.key(0))
    params = {"embed": jax.random.normal(keys[0], (7, 4)), "k": jax.random.normal(keys[1], (4, 4))}
    with refused_as_wrong():
        fastgpt_jax.compile(one_head, params, fastgpt_jax.CompileConfig(max_model_len=8))


@pytest.mark.slow
def test_certificate_catches_a_carry_that_padding_moves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emit.Context, "count", property(lambda self: self.num_rows))
    with refused_as_wrong():
        compile_model(BY_NAME["running_mean"])


def test_flop_bound_catches_a_recomputation(monkeypatch: pytest.MonkeyPatch):
    """With recomputation free, the cut keeps token ids and layer inputs, of which each step makes all keys again."""
    monkeypatch.setattr(cut, "recompute_cost", lambda *_: 0.0)
    derived = derive_model(BY_NAME["mha"])
    assert {str(state.dtype) for state in derived.program.plan.states} == {"int32", "float32"}
    with pytest.raises(NotServable, match="something is computed again for every cached token"):
        compile_model(BY_NAME["mha"])


def test_compile_certifies_before_it_returns(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise NotServable("no")

    monkeypatch.setattr(compile_module, "certify", refuse)
    with pytest.raises(NotServable):
        compile_model(BY_NAME["mqa"])
