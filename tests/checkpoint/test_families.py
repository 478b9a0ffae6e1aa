"""Switches of config.json that change a family's forward are honoured or refused, in every spelling."""

import pytest

from fastgpt_jax.checkpoint.registry import find_family
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.models.layers.rope import LinearScaling, Llama3Scaling

SHAPE = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
}
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
ABSENT = object()  # unlike null, which has a meaning of its own for some fields


def parse(model_type, max_model_len=None, **fields):
    values = {"model_type": model_type} | SHAPE | fields
    config = Fields({name: value for name, value in values.items() if value is not ABSENT}, "config.json")
    return find_family(config).parse_config(config, "float32", max_model_len)


def parse_bloom(**fields):
    others = {"num_hidden_layers": ABSENT, "num_attention_heads": ABSENT}
    return parse("bloom", **others | {"n_layer": 2, "n_head": 2} | fields)


@pytest.mark.parametrize(("given", "window"), [(8, 8), (None, None), (ABSENT, 4096)])
def test_window_of_mistral_is_a_number_none_or_the_formats_default(given, window):
    assert parse("mistral", sliding_window=given).sliding_window == window


def test_head_dim_is_a_share_of_the_width_where_it_is_null():
    assert parse("mistral", head_dim=None, hidden_size=24).head_dim == 12


def test_caps_of_gemma2_are_numbers_none_or_the_formats_defaults():
    def caps(**fields):
        config = parse("gemma2", **fields)
        return config.attn_logit_softcapping, config.final_logit_softcapping

    assert caps() == (50.0, 30.0)
    assert caps(attn_logit_softcapping=None, final_logit_softcapping=None) == (None, None)
    assert caps(attn_logit_softcapping=5.0, final_logit_softcapping=4) == (5.0, 4.0)


def test_layers_of_gemma_are_local_by_pattern_or_by_name():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert parse("gemma2").local_layers == (True, False, True, False)
    assert parse("gemma3_text").local_layers == (True,) * 4
    assert parse("gemma3_text", sliding_window_pattern=3).local_layers == (True, True, False, True)
    for model_type in ("gemma2", "gemma3_text"):
        assert parse(model_type, layer_types=kinds).local_layers == (False, True, True, False)


def test_rotations_of_gemma3_mean_the_same_in_both_spellings():
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = parse("gemma3_text", rope_theta=500.0, rope_local_base_freq=50.0, rope_scaling=scaling)
    nested = {
        "full_attention": scaling | {"rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    assert parse("gemma3_text", rope_parameters=nested) == old
    assert (old.rope_theta, old.rope_local_base_freq, old.rope_scaling) == (500.0, 50.0, LinearScaling(8.0))
    plain = parse("gemma3_text")
    assert (plain.rope_theta, plain.rope_local_base_freq) == (1e6, 1e4)


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "gemma2"])
def test_rope_parameters_and_the_older_spelling_mean_the_same(model_type):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    old = parse(model_type, rope_theta=500.0, rope_scaling=scaling | {"rope_type": "llama3"})
    assert parse(model_type, rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 500.0}) == old
    assert (old.rope_theta, old.rope_scaling) == (500.0, Llama3Scaling(8.0, 1.0, 4.0, 16))


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_of_phi3_means_the_same_in_every_spelling(kind):
    old = parse("phi3", 33, original_max_position_embeddings=32, rope_scaling=LONGROPE | {"type": kind})
    new = LONGROPE | {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    assert parse("phi3", 33, rope_parameters=new) == old
    assert (old.rope_scaling.factor, old.rope_scaling.is_long) == (2.0, True)
    assert not parse("phi3", 32, rope_parameters=new).rope_scaling.is_long
    assert parse("phi3", rope_parameters=new).rope_scaling.max_model_len == 64


def test_share_of_a_head_that_phi3_rotates_is_read_from_either_place():
    assert parse("phi3", partial_rotary_factor=0.75).rotary_dim == 6
    assert parse("phi3", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}).rotary_dim == 4


def test_bloom_is_read_under_its_older_names():
    assert parse_bloom(hidden_size=None, n_embed=16) == parse_bloom()
    assert parse_bloom(n_layer=None, num_hidden_layers=2, n_head=None, num_attention_heads=2) == parse_bloom()
    assert (parse_bloom().max_position_embeddings, parse_bloom(seq_length=99).max_position_embeddings) == (2048, 99)


@pytest.mark.parametrize(
    ("model_type", "fields", "needles"),
    [
        ("qwen2", {"use_sliding_window": True}, ["use_sliding_window=True"]),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ("qwen3", {"use_sliding_window": True}, ["use_sliding_window=True"]),
        ("qwen3", {"layer_types": ["sliding_attention"]}, ["layer_types"]),
        ("qwen3", {"head_dim": None}, ["must give head_dim"]),
        ("mistral", {"layer_types": ["full_attention"]}, ["layer_types"]),
        ("mistral", {"num_key_value_heads": None}, ["must give num_key_value_heads"]),
        ("mistral", {"sliding_window": -1}, ["sliding_window", "-1"]),
        ("mistral", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ("mistral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        ("gemma2", {"attn_logit_softcapping": "50"}, ["attn_logit_softcapping", "'50'"]),
        ("gemma2", {"hidden_activation": "swish2"}, ["hidden_activation='swish2'"]),
        ("gemma2", {"sliding_window": None}, ["must give sliding_window"]),
        ("gemma2", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
        ("gemma3_text", {"layer_types": ["full_attention"]}, ["layer_types", "each of 4 layers"]),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3 + ["linear"]}, ["layer_types", "'linear'"]),
        ("gemma3_text", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
            ["scales the rotations of local layers"],
        ),
        ("phi3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["Phi-3 does not have", "'longrope'"]),
        ("phi3", {"rope_scaling": LONGROPE | {"type": "longrope"}}, ["original_max_position_embeddings", "missing"]),
        (
            "phi3",
            {"original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            ["long_factor as a list", "None"],
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 32,
                "rope_scaling": LONGROPE | {"type": "longrope", "long_factor": [1.0]},
            },
            ["needs 4 numbers in long_factor", "got 1"],
        ),
        ("phi3", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor between 0 and 1"]),
        ("phi3", {"partial_rotary_factor": 0.4}, ["even head_dim, got 3"]),
        ("bloom", {"num_attention_heads": 3}, ["multiple of the heads", "n_head=3"]),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            ["apply_residual_connection_post_layernorm=True"],
        ),
    ],
    ids=str,
)
def test_what_a_family_does_not_have_is_refused_by_name(model_type, fields, needles):
    with pytest.raises(UserError) as caught:
        parse(model_type, **fields)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message
