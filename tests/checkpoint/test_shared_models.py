"""Real trained weights give the published text."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastgpt_jax.checkpoint import load_model
from tests.shared_data import shared_path

LENGTH = 72  # Every golden prompt and its continuation, padded to one length so that one compile serves all.
load_shared = functools.cache(lambda name: load_model(shared_path(f"models/{name}")))


@nnx.jit
def log_probabilities(model, tokens):
    return jax.nn.log_softmax(model(tokens), axis=-1)


def read_golden():
    return json.loads((shared_path("models/stories260K") / "golden.json").read_text())


def padded(ids):
    return jnp.asarray([ids + [0] * (LENGTH - len(ids))], jnp.int32)


@pytest.mark.parametrize("name", ["stories260K", "stories260K-hd32"])
def test_prompt_log_probabilities_and_greedy_ids_are_golden(name, strict_jax):
    model = load_shared(name).model
    for case in read_golden():
        prompt, continuation = case["prompt_ids"], case["greedy_ids"]
        ids = prompt + continuation
        rows = np.asarray(log_probabilities(model, padded(ids)))[0, : len(ids) - 1]
        of_next = rows[np.arange(len(rows)), ids[1:]]
        np.testing.assert_allclose(of_next[: len(prompt) - 1], case["prompt_logprobs"], atol=1e-4)
        assert rows[len(prompt) - 1 :].argmax(-1).tolist() == continuation


def test_greedy_decoding_by_the_full_forward_writes_the_golden_text():
    loaded = load_shared("stories260K")
    case = read_golden()[0]
    ids = loaded.tokenizer.encode(case["prompt"])
    for _ in range(8):
        rows = log_probabilities(loaded.model, padded(ids))
        ids.append(int(rows[0, len(ids) - 1].argmax()))
    assert ids == case["prompt_ids"] + case["greedy_ids"][:8]
    assert loaded.tokenizer.decode(ids) == "Once upon a time, there was a little girl"


def test_generation_defaults_of_the_shared_model():
    generation = load_shared("stories260K").generation
    assert (generation.max_model_len, generation.eos_token_ids, generation.bos_token_id) == (512, (2,), 1)
