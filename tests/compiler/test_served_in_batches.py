"""A request's tokens are the same alone and among seven others, through the public entry.

The model keeps every kind of state: cached rows, a window and a carry, stacked over scanned layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import fastgpt_jax
from tests.compiler import zoo

NUM_REQUESTS = 8
MARGIN = 1e-4  # where the two most likely tokens are nearer than this, float32 sums in another order may choose either


def requests(capacity: int) -> tuple[list[list[int]], list[fastgpt_jax.SamplingParams]]:
    """Prompts of different lengths that end at different times."""
    rng = np.random.default_rng(0)
    lengths = [1, 3, 5, 8, 9, 12, 16, 18]
    prompts = [[int(t) for t in rng.integers(1, 31, n)] for n in lengths]
    budgets = [10, 4, 12, 7, 3, 9, 12, capacity - 18]
    return prompts, [fastgpt_jax.SamplingParams(temperature=0, max_tokens=n, logprobs=2) for n in budgets]


def assert_same_tokens(alone: Any, among: Any) -> None:
    for i, (a, b) in enumerate(zip(alone.token_ids, among.token_ids, strict=True)):
        first, second = sorted((row.logprob for row in alone.logprobs[i].values()), reverse=True)[:2]
        if a != b:
            assert first - second < MARGIN
            return
        assert abs(alone.logprobs[i][a].logprob - among.logprobs[i][a].logprob) < MARGIN


def test_tokens_are_equal_alone_and_in_a_batch_of_eight():
    (model,) = [m for m in zoo.SERVED if m.name == "scan_layers_recurrent"]
    with zoo.jax_defaults():
        fn, params = model.make()
        config = fastgpt_jax.CompileConfig(
            max_model_len=model.capacity,
            page_size=5,
            max_num_seqs=NUM_REQUESTS,
            prefill_buckets=(8,),
            max_logprobs=2,
            unroll_layers=False,
        )
        compiled = fastgpt_jax.compile(fn, params, config)
    assert {entry.kind for entry in compiled.layout.entries} == {"kv", "window", "carry"}
    llm = fastgpt_jax.LLM(compiled)
    prompts, sampling = requests(model.capacity)
    among = llm.generate(prompt_token_ids=prompts, sampling_params=sampling, use_tqdm=False)
    again = llm.generate(prompt_token_ids=prompts[::-1], sampling_params=sampling[::-1], use_tqdm=False)[::-1]
    for i in (0, 4, NUM_REQUESTS - 1):
        (alone,) = llm.generate(prompt_token_ids=prompts[i : i + 1], sampling_params=sampling[i], use_tqdm=False)
        assert len(alone.outputs[0].token_ids) == sampling[i].max_tokens
        assert_same_tokens(alone.outputs[0], among[i].outputs[0])
    for first, second in zip(among, again, strict=True):  # in other slots, which others have used before
        assert_same_tokens(first.outputs[0], second.outputs[0])
