"""Compiled models under the whole engine: cached rows, a window, and carried values moved, shared and made again."""

from __future__ import annotations

import numpy as np
import pytest

import fastgpt_jax
from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.sampling.params import SamplingParams
from tests.compiler import zoo

pytestmark = pytest.mark.slow  # four models are compiled

MARGIN = 1e-4  # where the two most likely tokens are nearer than this, float32 sums in another order may choose either
BASE = [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]
PROMPTS = [BASE[:13], BASE[:4], BASE[:12] + [9, 1], BASE[:13]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
MODELS = {
    "gqa_grouped": ("ragged", {"kv"}),
    "shift_pad": ("rectangular", {"kv", "window"}),
    "scan_layers_recurrent": ("rectangular", {"kv", "window", "carry"}),
    "window_with_first_tokens": ("ragged", {"kv"}),
}


@pytest.fixture(scope="module", params=MODELS)
def compiled(request):
    (model,) = [m for m in zoo.SERVED if m.name == request.param]
    with zoo.jax_defaults():
        fn, params = model.make()
        config = fastgpt_jax.CompileConfig(
            max_model_len=model.capacity,
            page_size=4,
            max_num_seqs=3,
            num_pages=14,
            prefill_buckets=(8,),
            decode_buckets=(3,),
            max_num_batched_tokens=1,
            max_logprobs=2,
            unroll_layers=False,
        )
        compiled = fastgpt_jax.compile(fn, params, config)
    form, kinds = MODELS[request.param]
    assert compiled.layout.form == form and {entry.kind for entry in compiled.layout.entries} == kinds
    assert (compiled.layout.reach is not None) == request.param.startswith("window")
    return compiled


@pytest.fixture(scope="module")
def alone(compiled):
    """Each prompt in an engine of its own, with nothing to share."""
    results = []
    for prompt in PROMPTS:
        engine = LLMEngine(compiled, options=CoreOptions(enable_prefix_caching=False))
        results.append(engine.generate([prompt], PARAMS)[0].outputs[0])
    return results


def run(compiled, preempt=lambda engine, step: None, params=PARAMS, **options):
    """All prompts at once; returns the outputs in order, and the engine."""
    engine = LLMEngine(compiled, options=CoreOptions(poison_freed_pages=True, **options))
    for name, prompt in enumerate(PROMPTS):
        engine.add_request(str(name), prompt, params)
    done, num_steps = {}, 0
    while engine.has_unfinished_requests():
        done.update({int(output.request_id): output for output in engine.step() if output.finished})
        num_steps += 1
        preempt(engine, num_steps)
        engine.check_integrity()
    return [done[index] for index in range(len(PROMPTS))], engine


def assert_same(alone, found):
    """The same tokens, but where the two most likely are all but equally likely."""
    for first, output in zip(alone, found, strict=True):
        for completion in output.outputs:
            assert completion.finish_reason == "length", output.error
            for index, (a, b) in enumerate(zip(first.token_ids, completion.token_ids, strict=True)):
                one, two = sorted((row.logprob for row in first.logprobs[index].values()), reverse=True)[:2]
                if a != b:
                    assert one - two < MARGIN
                    break
                assert abs(first.logprobs[index][a].logprob - completion.logprobs[index][a].logprob) < MARGIN


@pytest.mark.parametrize("shares", [False, True])
def test_tokens_are_the_same_in_a_batch_with_and_without_the_prefix_cache(compiled, alone, shares):
    found, engine = run(compiled, enable_prefix_caching=shares)
    assert_same(alone, found)
    assert (engine.stats().prefix_cache_hits > 0) == shares
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, PARAMS)
        (again,) = [output for _ in range(20) for output in engine.step() if output.finished]
        assert_same([alone[index]], [again])
        # Pages are 4 tokens, and rows inside one can be used only where nothing is carried from row to row.
        is_short = len(prompt) == 4 and compiled.layout.form == "rectangular"
        assert (again.metrics.num_cached_tokens > 0) == (shares and not is_short)


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_tokens_are_the_same_after_a_preemption_at_any_step(compiled, alone, how):
    num_preempted = 0
    for at in range(1, 40):

        def preempt(engine, step, at=at):
            running = engine.core.scheduler.running
            if step == at and running:
                engine.core.preempt(running[at % len(running)], how)

        found, engine = run(compiled, preempt, swap_bytes=2**24, enable_prefix_caching=bool(at % 2))
        assert_same(alone, found)
        stats = engine.stats()
        num_preempted += stats.num_preemptions
        if not stats.num_preemptions:
            break
    assert num_preempted > 8


def test_tokens_are_the_same_where_pages_run_out_and_for_continuations(compiled, alone):
    found, engine = run(compiled, params=SamplingParams(temperature=0, max_tokens=6, logprobs=2, n=3))
    assert_same(alone, found)
    assert engine.stats().kv_cache_usage == 0


def test_pinned_steps_give_the_same_numbers_alone_and_in_a_batch(compiled):
    def run(prompts, **options):
        engine = LLMEngine(compiled, options=CoreOptions(pins_buckets=True, **options))
        return [output.outputs[0] for output in engine.generate(prompts, PARAMS)]

    together = run(PROMPTS)
    for prompt, output in zip(PROMPTS, together, strict=True):
        (alone,) = run([prompt])
        assert alone.token_ids == output.token_ids and alone.logprobs == output.logprobs


def test_serving_compiles_nothing_that_was_compiled(compiled, alone):
    engine = run(compiled, swap_bytes=2**24)[1]
    for _ in range(2):
        engine.generate(PROMPTS, PARAMS)
    before = engine.stats().num_compiles
    for _ in range(2):
        engine.generate(PROMPTS, PARAMS)
    assert engine.stats().num_compiles == before


def test_embeddings_are_the_same_alone_in_a_batch_and_from_the_prefix_cache(compiled):
    engine = LLMEngine(compiled)
    first = engine.embed(PROMPTS)
    again = LLMEngine(compiled).embed(PROMPTS[1]) + engine.embed(PROMPTS[2])
    for one, two in zip(first[1:3], again, strict=True):
        np.testing.assert_allclose(one.embedding, two.embedding, atol=1e-5)  # float32 sums in another order
        assert abs(np.linalg.norm(one.embedding) - 1) < 1e-5
    np.testing.assert_allclose(first[0].embedding, first[3].embedding, atol=1e-5)
    assert np.abs(first[0].embedding - first[1].embedding).max() > 1e-3
