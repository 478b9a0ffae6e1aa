"""A trained model, from its folder to its golden text: every golden prompt in one batch, through the public entry."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fastgpt_jax
from tests.shared_data import shared_path

TOLERANCE = 1e-4  # float32 log-probabilities of the golden file, printed in full


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "stories260K-hd32"])
def test_all_golden_prompts_in_one_batch(name: str):
    golden = json.loads((shared_path("models/stories260K") / "golden.json").read_text())
    llm = fastgpt_jax.LLM(str(shared_path(f"models/{name}")))
    lengths = [len(case["greedy_ids"]) for case in golden]
    greedy = {"temperature": 0, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 1}
    outputs = llm.generate(
        prompt_token_ids=[case["prompt_ids"] for case in golden],
        sampling_params=[fastgpt_jax.SamplingParams(max_tokens=n, **greedy) for n in lengths],
        use_tqdm=False,
    )
    tokenizer = llm.get_tokenizer()
    for case, output in zip(golden, outputs, strict=True):
        (continuation,) = output.outputs
        assert list(continuation.token_ids) == case["greedy_ids"]
        assert continuation.finish_reason == "length"
        of_prompt = [
            row[token].logprob for row, token in zip(output.prompt_logprobs[1:], case["prompt_ids"][1:], strict=True)
        ]
        np.testing.assert_allclose(of_prompt, case["prompt_logprobs"], atol=TOLERANCE)
        text = tokenizer.decode(case["prompt_ids"] + case["greedy_ids"])
        assert text.strip() == (tokenizer.decode(case["prompt_ids"]) + continuation.text).strip()
