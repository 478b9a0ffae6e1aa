"""The engine over a fake model: mixed lengths, ends, scores, mistakes, and random operations."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt_jax.engine.args import EngineArgs, make_engine_args
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.engine.loading import check_memory, resolve_model
from fastgpt_jax.engine.outputs import RequestOutput
from fastgpt_jax.engine.prompts import encode_prompt
from fastgpt_jax.errors import UserError
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.sampling.params import SamplingParams
from tests.engine.fake import VOCAB, CharTokenizer, FakeCompiled, continue_greedily, logits_after

PROMPTS = [[1], [3, 1, 4, 1, 5], list(range(12)), [9] * 20, [2, 7], list(range(8)), [5] * 9, [0]]
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def generate(llm, prompts, params):
    return llm.generate(prompt_token_ids=prompts, sampling_params=params, use_tqdm=False)


def test_mixed_lengths_give_the_tokens_of_each_alone():
    outputs = generate(LLM(FakeCompiled()), PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        num = min(6, 24 - len(prompt))
        assert output.outputs[0].token_ids == continue_greedily(prompt, num)
        assert output.outputs[0].finish_reason == "length" and output.finished
        assert output.prompt_token_ids == tuple(prompt)
    alone = [generate(LLM(FakeCompiled()), [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in outputs]


def test_random_requests_do_not_depend_on_the_batch():
    params = [SamplingParams(temperature=1.5, top_p=0.9, seed=i, max_tokens=5) for i in range(len(PROMPTS))]
    params[2] = GREEDY
    # Prefills of one row, so that the sampler is compiled for two shapes in this file and not for four.
    together = generate(LLM(FakeCompiled(max_num_batched_tokens=1)), PROMPTS, params)
    for index in range(0, len(PROMPTS), 3):
        alone = generate(LLM(FakeCompiled(max_num_batched_tokens=1)), [PROMPTS[index]], params[index])
        assert alone[0].outputs[0].token_ids == together[index].outputs[0].token_ids
    assert together[2].outputs[0].token_ids == continue_greedily(PROMPTS[2], 6)


def test_a_run_repeats_and_the_engine_seed_changes_it():
    params = SamplingParams(temperature=2.0, max_tokens=8)
    first, second, other = (
        generate(LLM(FakeCompiled(max_num_batched_tokens=1), seed=s), PROMPTS[:3], params) for s in (0, 0, 1)
    )
    assert first == second and first != other


def test_n_continuations_are_those_of_consecutive_seeds():
    params = SamplingParams(n=3, temperature=2.0, seed=5, max_tokens=4)
    llm = LLM(FakeCompiled(max_num_batched_tokens=1))
    output = generate(llm, [[1, 2]], params)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for index, completion in enumerate(output.outputs):
        one = SamplingParams(temperature=2.0, seed=5 + index, max_tokens=4)
        assert (
            generate(LLM(FakeCompiled(max_num_seqs=2)), [[1, 2]], one)[0].outputs[0].token_ids == completion.token_ids
        )


def test_few_entry_points_are_used():
    compiled = FakeCompiled(max_num_batched_tokens=16)
    generate(LLM(compiled), PROMPTS, GREEDY)
    assert compiled.shapes <= {(4, 4, "greedy", False)} | {
        (rows * bucket, rows, "greedy", False) for bucket, rows in ((4, 1), (4, 4), (8, 1), (8, 2))
    }


@pytest.mark.parametrize("num", [0, 3])
def test_logprobs_of_output_and_prompt_are_the_models(num):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=num, prompt_logprobs=num)
    compiled = FakeCompiled(tokenizer=CharTokenizer())
    output = generate(LLM(compiled), [prompt], params)[0]
    tokens = [*prompt, *output.outputs[0].token_ids]
    found = [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]
    assert found[0] is None and len(found) == len(tokens)
    for position in range(1, len(tokens)):
        logits = logits_after(tokens[:position]).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        entry, token_id = found[position], tokens[position]
        assert entry is not None and next(iter(entry)) == token_id
        assert set(entry) == {token_id} | set(np.argsort(-exact, kind="stable")[:num].tolist())
        for key, value in entry.items():
            assert abs(value.logprob - exact[key]) < 1e-5  # float32 sums of 32 terms
            assert value.rank == 1 + np.sum(exact > exact[key])
            assert value.decoded_token == CharTokenizer.letters[key]
    assert abs(output.outputs[0].cumulative_logprob - sum(found[i][tokens[i]].logprob for i in range(10, 13))) < 1e-5


def test_requests_end_at_eos_stop_tokens_and_stop_strings():
    prompt = [4, 4]
    expected = continue_greedily(prompt, 5)
    tokenizer = CharTokenizer()
    text = tokenizer.decode(expected)
    ends = GenerationDefaults(24, eos_token_ids=(expected[2],))
    eos = LLM(FakeCompiled(tokenizer=tokenizer, generation=ends, max_num_batched_tokens=1))
    plain = LLM(FakeCompiled(tokenizer=tokenizer))

    def run(llm, **params):
        completion = generate(llm, [prompt], SamplingParams(temperature=0, max_tokens=5, **params))[0].outputs[0]
        return completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason

    assert run(eos) == (expected[:3], text[:2], "stop", None)
    assert run(eos, ignore_eos=True) == (expected, text, "length", None)
    assert run(plain, stop_token_ids=[expected[1]]) == (expected[:2], text[:1], "stop", expected[1])
    stop = text[1:3]
    assert run(plain, stop=stop) == (expected[:3], text[:1], "stop", stop)
    assert run(plain, stop=[stop], include_stop_str_in_output=True) == (expected[:3], text[:3], "stop", stop)
    tokens, _, _, _ = run(eos, min_tokens=5)
    assert len(tokens) == 5 and expected[2] not in tokens[:3]


def test_streamed_text_only_grows_and_ends_as_generate_says():
    llm = LLM(FakeCompiled(tokenizer=CharTokenizer()))
    params = SamplingParams(
        temperature=0, max_tokens=10, stop=["zz", CharTokenizer().decode(continue_greedily([1], 6))[4:]]
    )
    texts = {0: "", 1: ""}
    for index, output in llm.stream(["b", "hello"], params):
        assert output.outputs[0].text.startswith(texts[index])
        texts[index] = output.outputs[0].text
    assert [o.outputs[0].text for o in llm.generate(["b", "hello"], params, use_tqdm=False)] == list(texts.values())
    assert not llm.llm_engine.has_unfinished_requests()


def test_two_streams_over_one_engine_do_not_lose_each_others_tokens():
    llm = LLM(FakeCompiled())
    first = llm.stream(prompt_token_ids=[[1, 2]], sampling_params=GREEDY)
    second = llm.stream(prompt_token_ids=[[3]], sampling_params=GREEDY)
    outputs = [next(first), *second, *first]
    assert outputs[6][1].outputs[0].token_ids == continue_greedily([3], 6)
    assert outputs[-1][1].outputs[0].token_ids == continue_greedily([1, 2], 6)


def test_what_comes_for_other_requests_while_prompts_are_run_is_kept_for_the_next_step():
    engine = LLMEngine(FakeCompiled(is_fast=True))
    engine.add_request("mine", [1, 2, 3], GREEDY)
    engine.generate(prompt_token_ids=[[4, 5]], sampling_params=SamplingParams(temperature=0, max_tokens=9))
    assert engine.has_unfinished_requests()
    (output,) = engine.step()
    assert isinstance(output, RequestOutput) and output.request_id == "mine" and output.finished
    assert output.outputs[0].token_ids == continue_greedily([1, 2, 3], 6)
    assert engine.step() == [] and not engine.has_unfinished_requests()


def test_leaving_a_stream_frees_its_slots():
    llm = LLM(FakeCompiled())
    stream = llm.stream(prompt_token_ids=PROMPTS, sampling_params=GREEDY)
    next(stream)
    stream.close()
    assert not llm.llm_engine.has_unfinished_requests()
    llm.llm_engine.check_integrity()


def test_a_bad_request_leaves_the_others_running():
    engine = LLMEngine(FakeCompiled())
    engine.add_request("good", [1, 2, 3], GREEDY)
    engine.step()
    for prompt in ([], [VOCAB], [-1], [1] * 24, "text"):
        with pytest.raises(UserError):
            engine.add_request("bad", prompt, GREEDY)
        engine.check_integrity()
    with pytest.raises(UserError, match="in use"):
        engine.add_request("good", [1], GREEDY)
    while engine.has_unfinished_requests():
        last = engine.step()
    assert last[0].outputs[0].token_ids == continue_greedily([1, 2, 3], 6)


@pytest.mark.parametrize(
    ("compiled", "prompts", "params", "message"),
    [
        (FakeCompiled(), [[1], []], GREEDY, "prompt 1: the prompt is empty"),
        (FakeCompiled(), [[32]], GREEDY, "token id 32 is outside the vocabulary of 32"),
        (FakeCompiled(), [[1] * 24], GREEDY, "the prompt has 24 tokens and the context holds 24"),
        (FakeCompiled(min_first_chunk=3), [[1, 2]], GREEDY, "sees its first 3 tokens"),
        (FakeCompiled(), ["text"], GREEDY, "no tokenizer"),
        (FakeCompiled(), [[1]], {"temperature": float("nan")}, "temperature must be"),
        (FakeCompiled(), [[1]], {"warmth": 1.0}, "warmth"),
        (FakeCompiled(), [[1]], {"logprobs": 6}, "logprobs may be at most 5"),
        (FakeCompiled(), [[1]], {"stop": "x"}, "no tokenizer"),
        (FakeCompiled(), [[1]], {"stop_token_ids": [32]}, "of stop_token_ids is outside"),
        (FakeCompiled(), [[1]], [GREEDY, GREEDY], "got 2 for 1 prompts"),
        (FakeCompiled(), None, GREEDY, "either prompts or prompt_token_ids"),
    ],
)
def test_a_mistake_is_one_clear_line(compiled, prompts, params, message):
    with pytest.raises(UserError) as error:
        LLM(compiled).generate(prompts, params, use_tqdm=False)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2, but the model was compiled for 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size=4 is not supported"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of auto, int8, fp8, got 'int4'"),
        ({"max_num_seq": 2}, "did you mean max_num_seqs"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1"),
        ({"max_model_len": 1}, "max_model_len must be an integer of at least 2"),
        ({"max_model_len": 99}, "compiled for 24"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dtype": "bfloat16"}, "decided when a model is compiled"),
        ({"gpu_memory_utilization": 2.0}, "above 0 and at most 1"),
    ],
)
def test_an_engine_argument_is_obeyed_or_refused(options, message):
    with pytest.raises(UserError, match=message):
        LLM(FakeCompiled(), **options)


class WithArrays(FakeCompiled):
    def init_state(self):
        return jnp.zeros((1024, 1024), jnp.float32)


def test_memory_beyond_the_share_allowed_is_refused():
    assert resolve_model(EngineArgs(WithArrays(), gpu_memory_utilization=1.0)).max_num_seqs == 4
    with pytest.raises(UserError, match="lower max_num_seqs or max_model_len"):
        resolve_model(EngineArgs(WithArrays(), gpu_memory_utilization=1e-9))


def test_a_model_that_is_compiled_now_is_told_the_share(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fastgpt_jax.compiler.compile.compile", lambda model, config: asked.append(config) or FakeCompiled()
    )
    loaded = SimpleNamespace(generation=GenerationDefaults(24), model=None)
    resolve_model(EngineArgs(loaded, gpu_memory_utilization=0.25))
    assert asked[0].gpu_memory_utilization == 0.25


def test_copies_of_carried_values_count_as_memory(monkeypatch):
    carried = FakeCompiled(is_carried=True)
    layout = carried.layout
    needed = layout.num_pages * layout.bytes_per_page + 3 * 4 * layout.bytes_per_request  # two copies a request
    monkeypatch.setattr("fastgpt_jax.engine.loading.jax.local_devices", lambda: [SimpleNamespace(memory_stats=dict)])
    monkeypatch.setattr("fastgpt_jax.engine.loading.device_memory_bytes", lambda num_devices: needed)
    check_memory(carried, 1.0)
    with pytest.raises(UserError, match="lower max_num_seqs"):
        check_memory(carried, (needed - 1) / needed)


def test_a_first_chunk_that_no_bucket_holds_is_a_broken_promise():
    with pytest.raises(RuntimeError, match="the first 9 tokens"):
        LLMEngine(FakeCompiled(min_first_chunk=9))


def test_a_model_that_is_none_is_refused():
    with pytest.raises(UserError, match="must be a folder, a loaded model or a compiled one, got tuple"):
        LLM((lambda params, tokens: tokens, {}))
    assert make_engine_args("m", {"max_num_seqs": 3}) == EngineArgs("m", max_num_seqs=3)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ("ab", [0, 1])),
        ({"prompt": "ab"}, ("ab", [0, 1])),
        ({"prompt_token_ids": [3]}, (None, [3])),
        ([1, np.int32(2)], (None, [1, 2])),
        (np.array([4, 5]), (None, [4, 5])),
    ],
)
def test_prompts_come_in_many_forms(prompt, expected):
    assert encode_prompt(prompt, CharTokenizer()) == expected


@pytest.mark.parametrize("prompt", [5, "", {"text": "a"}, [1.5], [True], None])
def test_other_forms_of_prompt_are_refused(prompt):
    with pytest.raises(UserError):
        encode_prompt(prompt, CharTokenizer())


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 23), st.integers(1, 9), st.integers(1, 2)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 4)),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(OPERATIONS, st.integers(1, 5), st.sampled_from([1, 3]))
def test_random_adds_aborts_and_steps_keep_the_engine_whole(operations, max_num_seqs, min_first_chunk):
    compiled = FakeCompiled(
        max_num_seqs=max_num_seqs,
        min_first_chunk=min_first_chunk,
        is_fast=True,
        max_num_batched_tokens=16,
        decode_rows=(1, 2, 4),
    )
    engine = LLMEngine(compiled)
    prompts, done = {}, {}
    for operation in operations:
        if operation[0] == "add":
            _, num_prompt, max_tokens, n = operation
            prompt = [(num_prompt * 7 + i * len(prompts)) % VOCAB for i in range(num_prompt)]
            name = str(len(prompts))
            prompts[name] = (prompt, max_tokens, n)
            if num_prompt < min_first_chunk:
                with pytest.raises(UserError):
                    engine.add_request(name, prompt, GREEDY)
                del prompts[name]
                prompts[name] = ([], 0, 0)
            else:
                engine.add_request(name, prompt, SamplingParams(n=n, temperature=0, max_tokens=max_tokens))
        elif operation[0] == "abort":
            engine.abort_request(str(operation[1]))
        else:
            for _ in range(operation[1]):
                done.update({output.request_id: output for output in engine.step() if output.finished})
        engine.check_integrity()
    while engine.has_unfinished_requests():
        done.update({output.request_id: output for output in engine.step() if output.finished})
        engine.check_integrity()
    for name, output in done.items():
        prompt, max_tokens, n = prompts[name]
        expected = continue_greedily(prompt, min(max_tokens, 24 - len(prompt)))
        assert [completion.token_ids for completion in output.outputs] == [expected] * n


def test_an_engine_generates_as_an_llm_does_with_parameters_in_a_dict():
    compiled = FakeCompiled()
    args = EngineArgs(model=compiled)
    engine = LLMEngine.from_engine_args(args)
    outputs = engine.generate(prompt_token_ids=[[1, 2], [3]], sampling_params={"temperature": 0.0, "max_tokens": 4})
    same = LLM(FakeCompiled()).generate(
        prompt_token_ids=[[1, 2], [3]], sampling_params=SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False
    )
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in same]
    assert not engine.has_unfinished_requests()
