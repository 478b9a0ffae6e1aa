"""Forms in the engine: every text keeps to its own, whatever else runs, however tokens are drawn."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.errors import UserError
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.sampling.params import SamplingParams
from tests.engine.fake import CharTokenizer, FakeCompiled, continue_greedily
from tests.shared_data import shared_path

END = CharTokenizer.letters.index("$")
REGEX = r"(dog|cat|bird)( and (a|the) (mouse|fly)){0,2}\."


def fake():
    return FakeCompiled(
        max_model_len=48,
        max_num_batched_tokens=1,
        tokenizer=CharTokenizer(),
        generation=GenerationDefaults(max_model_len=48, eos_token_ids=(END,)),
    )


@pytest.fixture(scope="module")
def llm():
    return LLM(fake())


def generate(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_texts_keep_to_their_forms_beside_free_ones(llm, temperature):
    form = SamplingParams(temperature=temperature, seed=1, max_tokens=40, structured_outputs={"regex": REGEX})
    free = SamplingParams(temperature=0, max_tokens=6)
    choice = SamplingParams(temperature=temperature, seed=2, structured_outputs={"choice": ["yes", "no", "maybe"]})
    prompts = ["abc", "hello", "what", "is it", "abcd", "z"]
    outputs = generate(llm, prompts, [form, free, choice, form, free, choice])
    for prompt, output, params in zip(prompts, outputs, [form, free, choice, form, free, choice], strict=True):
        (one,) = output.outputs
        if params is free:
            assert one.token_ids == continue_greedily(CharTokenizer().encode(prompt), 6)
        elif params is choice:
            assert one.text in ("yes", "no", "maybe") and one.finish_reason == "stop"
        else:
            assert re.fullmatch(REGEX, one.text) and one.finish_reason == "stop" and one.stop_reason is None


def test_continuations_of_one_prompt_have_places_of_their_own(llm):
    params = SamplingParams(n=6, temperature=5.0, seed=3, max_tokens=40, structured_outputs={"regex": REGEX})
    texts = [one.text for one in generate(llm, ["abc"], params)[0].outputs]
    assert all(re.fullmatch(REGEX, text) for text in texts) and len(set(texts)) > 1


def test_the_end_of_text_comes_only_where_the_form_is_complete(llm):
    biased = SamplingParams(temperature=0, logit_bias={END: 100.0}, structured_outputs={"regex": "(ab)+"})
    (one,) = generate(llm, ["abc"], biased)[0].outputs
    assert one.text == "ab" and one.token_ids[-1] == END and one.finish_reason == "stop"


def test_min_tokens_holds_as_long_as_the_form_goes_on(llm):
    params = SamplingParams(temperature=0, logit_bias={END: 100.0}, min_tokens=7, structured_outputs={"regex": "(ab)+"})
    (one,) = generate(llm, ["abc"], params)[0].outputs
    assert one.text == "abababab" and one.token_ids[-1] == END
    short = SamplingParams(temperature=0, min_tokens=7, max_tokens=9, structured_outputs={"regex": "ab"})
    (one,) = generate(llm, ["abc"], short)[0].outputs
    assert one.text == "ab" and one.finish_reason == "stop"


def test_max_tokens_and_stop_strings_still_end_a_text(llm):
    cut = SamplingParams(temperature=0, max_tokens=3, structured_outputs={"regex": "(ab){9}"})
    (one,) = generate(llm, ["abc"], cut)[0].outputs
    assert one.text == "aba" and one.finish_reason == "length"
    just = SamplingParams(temperature=0, max_tokens=3, structured_outputs={"choice": ["dog"]})
    (one,) = generate(llm, ["abc"], just)[0].outputs
    assert one.text == "dog" and one.finish_reason == "stop"
    stopped = SamplingParams(temperature=0, stop="ba", structured_outputs={"regex": "(ab){9}"})
    (one,) = generate(llm, ["abc"], stopped)[0].outputs
    assert one.text == "a" and one.stop_reason == "ba"


def test_a_form_that_cannot_be_compiled_is_refused_and_the_others_run_on():
    engine = LLMEngine(fake())
    engine.add_request("a", "abc", SamplingParams(temperature=0, max_tokens=4))
    with pytest.raises(UserError, match="look-around"):
        engine.add_request("b", "abc", SamplingParams(structured_outputs={"regex": "(?=a)"}))
    with pytest.raises(UserError, match="no text of this model's tokens"):
        engine.add_request("c", "abc", SamplingParams(structured_outputs={"regex": "[A-Z]+"}))
    assert engine.get_num_unfinished_requests() == 1
    engine.check_integrity()


def test_a_text_that_runs_into_a_dead_end_fails_alone():
    engine = LLMEngine(fake())
    # There is no token for the capital letter.
    engine.add_request("dead", "abc", SamplingParams(temperature=0, structured_outputs={"regex": "abX"}))
    engine.add_request("free", "abc", SamplingParams(temperature=0, max_tokens=5))
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    assert finished["dead"].outputs[0].finish_reason == "error"
    assert finished["dead"].outputs[0].text == "ab" and "structured_outputs failed" in finished["dead"].error
    assert finished["free"].outputs[0].token_ids == continue_greedily(CharTokenizer().encode("abc"), 5)


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_a_preemption_at_any_step_changes_no_text(how):
    form = SamplingParams(temperature=2.0, seed=7, n=2, max_tokens=12, structured_outputs={"regex": "(ab|cd?)+e{2}x"})
    free = SamplingParams(temperature=2.0, seed=8, max_tokens=8)

    def run(at):
        engine = LLMEngine(fake(), options=CoreOptions(swap_bytes=2**20))
        engine.add_request("form", "abc", form)
        engine.add_request("free", "abd", free)
        texts, num_steps = {}, 0
        while engine.has_unfinished_requests():
            texts |= {output.request_id: [c.text for c in output.outputs] for output in engine.step()}
            num_steps += 1
            victims = [r for r in engine.core.scheduler.running if r.group.request_id == "form"]
            if num_steps == at and victims:
                engine.core.preempt(victims[0], how)
            engine.check_integrity()
        return texts, engine.stats().num_preemptions

    expected, _ = run(0)
    preempted = [run(at) for at in range(1, 12)]
    assert all(texts == expected for texts, _ in preempted)
    assert sum(num for _, num in preempted) >= 5


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["dogs", "cats"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_a_trained_model_writes_what_a_schema_asks_for():
    llm = LLM(str(shared_path("models/stories260K")), max_model_len=128, max_num_seqs=2)
    json_form = {"json": PERSON, "disable_any_whitespace": True}
    params = [
        SamplingParams(temperature=0, max_tokens=100, structured_outputs=json_form),
        SamplingParams(temperature=1.0, seed=1, n=2, max_tokens=100, structured_outputs=json_form),
        SamplingParams(temperature=0, structured_outputs={"choice": [" a happy dog.", " a sad cat."]}),
    ]
    greedy, drawn, choice = generate(llm, ["Once upon a time there was"] * 3, params)
    for one in (*greedy.outputs, *drawn.outputs):
        jsonschema.validate(json.loads(one.text), PERSON)
        assert one.finish_reason == "stop"
    assert drawn.outputs[0].text != drawn.outputs[1].text
    assert choice.outputs[0].text in params[2].structured_outputs.choice
