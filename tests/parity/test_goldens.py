"""Our logits are those of transformers, through the same files a user would load."""

import dataclasses
from pathlib import Path

import pytest

from fastgpt_jax.checkpoint.registry import FAMILIES
from tests.parity.goldens import GOLDENS, error_against, golden_config, golden_path, load_golden

# One of each family, and of each of the scalings.
QUICK = ("llama_tied_biased", "llama_linear", "llama_llama3", "llama_yarn_mscale", "qwen2", "gpt2", "mistral", "qwen3")
QUICK = (*QUICK, "gemma2", "gemma3", "phi3", "phi3_longrope_short", "phi3_longrope_long", "bloom_six_heads")


def mark(golden: Path | str):
    """A parameter of a test, marked slow unless the golden is one of the quick ones."""
    name = golden.stem if isinstance(golden, Path) else golden
    return pytest.param(golden, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("path", [*map(mark, GOLDENS)], ids=lambda path: path.stem)
def test_logits_equal_those_of_transformers(path, tmp_path, strict_jax):
    # Float32 on both sides; measured 8e-6 at worst (x86, jax 0.10.2).
    assert error_against(path, load_golden(path, tmp_path).model) < 1e-4


SWITCHES = {
    "llama_linear": {"rope_scaling": None},
    "llama_llama3": {"rope_scaling": None},
    "llama3_1": {"rope_scaling": None},
    "llama3_2": {"rope_scaling": None},
    "llama_yarn": {"rope_scaling": None},
    "llama_yarn_mscale": {"rope_scaling": None},
    "phi3_longrope_short": {"rope_scaling": None},
    "phi3_longrope_partial": {"rope_scaling": None},
    "gemma3": {"rope_local_base_freq": 500.0},
    "gemma3_linear_capped": {"rope_scaling": None},
    "gemma2": {"final_logit_softcapping": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHES)
def test_golden_can_tell_a_field_of_the_config(name, tmp_path):
    path = golden_path(name)
    model = load_golden(path, tmp_path).model
    model.config = dataclasses.replace(model.config, **SWITCHES[name])
    assert error_against(path, model) > 1e-2


LAYERS = {
    "mistral": {"window": None},
    "phi3": {"window": None},
    "gemma2": {"softcap": None},
    "gemma2_uncapped": {"window": None},
    "gemma3": {"window": 9},  # one position more
    "qwen3": {"has_head_norms": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_golden_can_tell_a_switch_of_attention(name, tmp_path):
    path = golden_path(name)
    model = load_golden(path, tmp_path).model
    for layer in model.layers:
        for field, value in LAYERS[name].items():
            setattr(layer.attention, field, value)
    assert error_against(path, model) > 1e-2


@pytest.mark.parametrize(("name", "other"), [("phi3_longrope_short", 256), ("phi3_longrope_long", 16)])
def test_factors_of_longrope_are_chosen_by_the_length_to_serve(name, other, tmp_path):
    path = golden_path(name)
    original = golden_config(path)["original_max_position_embeddings"]
    loaded, swapped = load_golden(path, tmp_path), load_golden(path, tmp_path, max_model_len=other)
    sides = {True: ("long", ">"), False: ("short", "<=")}
    for model in (loaded, swapped):
        length = model.generation.max_model_len
        side, sign = sides[length > original]
        note = f"longrope: {side} factors, max_model_len {length} {sign} original {original}"
        assert model.notes == {"rope_scaling": note}
    assert loaded.notes != swapped.notes
    assert error_against(path, swapped.model) > 1e-2


def test_every_family_has_a_golden():
    compared = {golden_config(path)["model_type"] for path in GOLDENS}
    assert compared == {name for family in FAMILIES for name in family.model_types}
