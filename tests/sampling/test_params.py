"""Sampling parameters refuse what has no meaning, in one line that names the value and the range."""

from __future__ import annotations

import math

import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", math.nan, "between 0 and 1000000"),
        ("temperature", math.inf, "between 0 and 1000000"),
        ("temperature", -0.1, "between 0 and 1000000"),
        ("temperature", "hot", "between 0 and 1000000"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("min_p", -0.5, "between 0 and 1"),
        ("typical_p", 0.0, "above 0 and at most 1"),
        ("presence_penalty", 2.5, "between -2 and 2"),
        ("frequency_penalty", -3, "between -2 and 2"),
        ("temperature", 1e38, "between 0 and 1000000"),
        ("repetition_penalty", 0, "between 0.001 and 1000"),
        ("repetition_penalty", 1e-40, "between 0.001 and 1000"),
        ("repetition_penalty", 1e300, "between 0.001 and 1000"),
        ("top_k", -2, "an integer of at least -1"),
        ("top_k", 1.5, "an integer of at least -1"),
        ("n", 0, "an integer of at least 1"),
        ("n", True, "an integer of at least 1"),
        ("max_tokens", 0, "an integer of at least 1 or None"),
        ("min_tokens", -1, "an integer of at least 0"),
        ("min_tokens", 17, "must not exceed max_tokens"),
        ("logprobs", -2, "an integer of at least 0 or None"),
        ("prompt_logprobs", 2.0, "an integer of at least 0 or None"),
        ("seed", 2**63, "a 64-bit integer or None"),
        ("stop", [""], "non-empty strings"),
        ("stop_token_ids", [-1], "token ids of at least 0"),
        ("logit_bias", {1: math.nan}, "between -100 and 100"),
        ("logit_bias", {-1: 1.0}, "token ids of at least 0"),
        ("logit_bias", dict.fromkeys(range(301), 1.0), "at most 300"),
        ("ignore_eos", 1, "True or False"),
        ("stop", 3, "a string or a list of strings"),
        ("stop_token_ids", 3, "a list of token ids"),
        ("logit_bias", [1], "a mapping of token ids to numbers"),
        ("structured_outputs", "json", "a mapping with one of json"),
        ("structured_outputs", {"jsn": {}}, "has no 'jsn'"),
        ("structured_outputs", {}, "exactly one of"),
    ],
)
def test_a_bad_value_is_one_clear_line(name, value, allowed):
    with pytest.raises(UserError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert name in message and allowed in message and "\n" not in message


def test_spellings_are_normalized():
    params = SamplingParams(stop="ab", stop_token_ids=[3], seed=-1, top_k=-1, logit_bias=None)
    assert params.stop == ("ab",) and params.stop_token_ids == (3,)
    assert params.seed is None and params.logit_bias == {}
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize(
    ("params", "is_full"),
    [
        (SamplingParams(temperature=0), False),
        (SamplingParams(temperature=0, top_p=0.5, top_k=3), False),
        (SamplingParams(), True),
        (SamplingParams(temperature=0, repetition_penalty=1.1), True),
        (SamplingParams(temperature=0, logit_bias={1: 1.0}), True),
        (SamplingParams(temperature=0, min_tokens=2), True),
        (SamplingParams(temperature=0, structured_outputs={"choice": ["a"]}), True),
    ],
)
def test_only_what_moves_the_token_asks_for_the_full_sampler(params, is_full):
    assert params.needs_full_sampler is is_full


def test_a_form_may_be_given_as_a_mapping_and_says_itself_where_the_text_ends():
    params = SamplingParams(structured_outputs={"json": {"type": "object"}})
    assert params.structured_outputs.kind == "json" and params.structured_outputs.json == '{"type": "object"}'
    with pytest.raises(UserError, match="ignore_eos has no meaning with structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, ignore_eos=True)
