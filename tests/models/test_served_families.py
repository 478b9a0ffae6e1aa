"""Every family is served: greedy tokens from the caches are the most likely ones of the whole forward."""

import jax.numpy as jnp
import numpy as np
import pytest

import fastgpt_jax
from tests.parity.goldens import forward, golden_path, load_golden

PROMPT_LEN, LENGTH = 20, 44  # both past the windows of the goldens, which are 8
MARGIN = 1e-4
QUICK = ("phi3",)  # a window and rotations
SLOW = (
    "gemma3",
    "bloom_six_heads",
    "llama3_1",
    "deepseek_llama",
    "deepseek_qwen2",
    "mistral",
    "mistral_full",
    "qwen3",
    "qwen3_tied_biased",
    "gemma2",
    "gemma2_uncapped",
    "gemma3_linear_capped",
    "phi3_longrope_short",
    "phi3_longrope_long",
    "phi3_longrope_partial",
    "gpt2",
    "bloom",
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_tokens_from_the_caches_are_those_of_the_whole_forward(name, tmp_path):
    assert_served_exactly(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "gemma3", "bloom_six_heads", "gpt2"])
def test_families_with_fused_tensors_and_norms_on_heads_divide_among_devices(name, tmp_path):
    assert_served_exactly(name, tmp_path, tensor_parallel_size=2)


def assert_served_exactly(name, folder, **options):
    path = golden_path(name)
    loaded = load_golden(path, folder)
    prompt = np.load(path)["tokens"][0, :PROMPT_LEN].tolist()
    config = fastgpt_jax.CompileConfig(max_model_len=LENGTH, max_num_seqs=1, prefill_buckets=(8,), **options)
    llm = fastgpt_jax.LLM(fastgpt_jax.compile(loaded, config=config))
    sampling = fastgpt_jax.SamplingParams(temperature=0, max_tokens=LENGTH - PROMPT_LEN, ignore_eos=True)
    (request,) = llm.generate(prompt_token_ids=[prompt], sampling_params=sampling, use_tqdm=False)
    served = request.outputs[0].token_ids
    assert len(served) == LENGTH - PROMPT_LEN
    logits = np.asarray(forward(loaded.model, jnp.asarray([[*prompt, *served]], jnp.int32)))[0]
    for row, token in zip(logits[PROMPT_LEN - 1 :], served, strict=False):
        # The most likely token of the whole forward; two that are nearer than the sums' order are both right.
        assert row.max() - row[token] < MARGIN
