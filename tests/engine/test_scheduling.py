"""Order, turns, deadlines, aborts, failures: who runs when, and what it ends with."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt_jax.artifact.entry_points import Buckets
from fastgpt_jax.engine.args import EngineArgs
from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.device_clock import DeviceClock
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.engine.pooling import PoolingParams
from fastgpt_jax.engine.shapes import Shapes
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams
from tests.engine.fake import CharTokenizer, FakeCompiled, continue_greedily, hidden_after, rows_of, sums_of


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def greedy(max_tokens, **options):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def make_engine(clock=None, fields=None, **options):
    extra = {} if clock is None else {"clock": clock}
    fields = {"is_fast": True, "decode_rows": (1, 2), **(fields or {})}
    return LLMEngine(FakeCompiled(**fields), options=CoreOptions(**options), **extra)


def finish(engine):
    """Steps until all is done; returns the last outputs in the order in which they came."""
    done = {}
    while engine.has_unfinished_requests():
        done.update({output.request_id: output for output in engine.step() if output.finished})
        engine.check_integrity()
    return done


def test_lower_priority_values_run_first_and_take_the_place_of_others():
    engine = make_engine(fields={"max_num_seqs": 1})
    engine.add_request("low", [1, 2, 3], greedy(8), priority=5)
    engine.step()
    engine.add_request("middle", [4], greedy(3), priority=2)
    engine.add_request("high", [5], greedy(3), priority=-1)
    done = finish(engine)
    assert list(done) == ["high", "middle", "low"]
    assert done["low"].outputs[0].token_ids == continue_greedily([1, 2, 3], 8)
    assert engine.stats().num_preemptions >= 1


def test_equals_run_in_the_order_of_their_arrival_and_are_not_preempted_by_each_other():
    engine = make_engine(fields={"max_num_seqs": 1})
    for name in "abc":
        engine.add_request(name, [1, 2, 3], greedy(4))
    assert list(finish(engine)) == ["a", "b", "c"] and engine.stats().num_preemptions == 0


@pytest.mark.parametrize("form", ["ragged", "rectangular"])
def test_neither_a_long_prompt_nor_long_answers_starve_others(form):
    fields = {"max_model_len": 512, "max_num_seqs": 4, "form": form, "max_num_batched_tokens": 1}
    engine = make_engine(fields=fields)
    engine.add_request("answer", [1], greedy(200))
    engine.add_request("prompt", [n % 32 for n in range(400)], greedy(4))
    for _ in range(6):
        engine.step()
    engine.add_request("short", [7, 8, 9], greedy(4))
    lengths, when = [], {}
    for step in range(300):
        for output in engine.step():
            if output.request_id == "answer":
                lengths.append(len(output.outputs[0].token_ids))
            if output.finished:
                when[output.request_id] = step
        if len(when) == 3:
            break
    # The short one is done long before the long prompt, which goes on beside the answers, as they do beside it.
    assert when["short"] < 20 < when["prompt"] < when["answer"]
    assert lengths[-1] == 200 and when["prompt"] < 130


def test_new_prompts_do_not_starve_one_that_is_under_way():
    fields = {"max_model_len": 512, "prefill_buckets": (8,), "max_num_batched_tokens": 1}
    engine = make_engine(fields=fields, enable_prefix_caching=False)
    engine.add_request("long", [n % 32 for n in range(320)], greedy(1))
    for step in range(400):
        if engine.stats().num_waiting < 2:
            engine.add_request(str(step), [step % 32] * 16, greedy(1))
        if any(output.request_id == "long" for output in engine.step()):
            break
    assert 80 < step < 320  # 40 chunks, in turns with others of which there are always more


def test_a_program_mixes_decodes_and_prompts_where_it_can():
    compiled = FakeCompiled(is_fast=True, max_model_len=64)
    for form, mixes in (("ragged", True), ("rectangular", False)):
        compiled = FakeCompiled(is_fast=True, max_model_len=64, form=form)
        engine = LLMEngine(compiled)
        seen = set()
        dispatch = engine.core._runner.dispatch

        def watch(plan, inputs, seen=seen, dispatch=dispatch):
            seen.add(frozenset("decode" if row.start >= row.request.num_prompt else "prompt" for row in plan.rows))
            return dispatch(plan, inputs)

        engine.core._runner.dispatch = watch
        engine.add_request("a", [1], greedy(20))
        engine.step()
        engine.add_request("b", [n % 32 for n in range(50)], greedy(2))
        finish(engine)
        assert (frozenset({"decode", "prompt"}) in seen) == mixes


def test_steps_stay_within_the_tokens_they_are_given():
    engine = make_engine(fields={"max_model_len": 64, "prefill_buckets": (4, 16)}, max_num_batched_tokens=8)
    engine.add_request("a", list(range(30)), greedy(3))
    assert finish(engine)["a"].outputs[0].token_ids == continue_greedily(list(range(30)), 3)
    assert max(tokens for tokens, *_ in engine.compiled.shapes) <= 8


def test_an_idle_engine_waits_for_a_batch_or_its_time():
    clock = Clock()
    engine = make_engine(clock, min_batch=2, batch_timeout_ms=500)
    engine.add_request("a", [1], greedy(2))
    assert not engine.step() and engine.stats().num_running == 0
    clock.now += 0.6
    assert engine.step()[0].request_id == "a"  # its time has come
    engine.add_request("b", [2], greedy(2))
    assert set(finish(engine)) == {"a", "b"}  # a running engine takes what comes
    engine.add_request("c", [1], greedy(2))
    engine.add_request("d", [1], greedy(2))
    assert engine.step()  # there are two


def test_no_more_run_together_than_max_batch_says():
    engine = make_engine(max_batch=2)
    for name in "abcd":
        engine.add_request(name, [1, 2], greedy(4))
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, engine.stats().num_running)
    assert most == 2


def test_a_deadline_ends_a_request_with_what_it_has():
    clock = Clock()
    engine = make_engine(clock, fields={"max_num_seqs": 1})
    engine.add_request("runs", [1, 2], greedy(20), deadline_s=5)
    engine.add_request("waits", [3], greedy(4), deadline_s=5)
    engine.add_request("later", [4], greedy(2))
    for _ in range(4):
        engine.step()
    clock.now += 5
    done = {output.request_id: output for output in engine.step() if output.finished}
    assert [done[name].outputs[0].finish_reason for name in ("runs", "waits")] == ["deadline"] * 2
    found = done["runs"].outputs[0].token_ids
    assert found and found == continue_greedily([1, 2], 20)[: len(found)] and not done["waits"].outputs[0].token_ids
    assert finish(engine)["later"].outputs[0].token_ids == continue_greedily([4], 2)


def test_an_abort_frees_all_at_once_and_returns_what_there_was():
    engine = make_engine()
    engine.add_request("a", [1, 2, 3], greedy(9, n=2))
    for _ in range(4):
        engine.step()
    assert engine.stats().kv_cache_usage > 0
    (output,) = engine.abort_request(["a", "nobody"])
    assert engine.stats().kv_cache_usage == 0 and not engine.has_unfinished_requests()
    assert output.finished and [one.finish_reason for one in output.outputs] == ["abort"] * 2
    assert output.outputs[0].token_ids == continue_greedily([1, 2, 3], 9)[: len(output.outputs[0].token_ids)]
    engine.add_request("a", [1], greedy(2))  # the step that was under way says nothing of it any more
    assert finish(engine)["a"].outputs[0].token_ids == continue_greedily([1], 2)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_failed_step_ends_its_own_requests_and_no_other(at):
    num_steps = 0

    def fails(inputs):
        nonlocal num_steps
        num_steps += 1
        return num_steps == at

    engine = make_engine(fields={"max_num_seqs": 2, "fails": fails})
    prompts = {"a": [1, 2, 3], "b": [4] * 9, "c": [5], "d": [6, 7]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(5))
    done = finish(engine)
    failed = [name for name, output in done.items() if output.outputs[0].finish_reason == "error"]
    assert 1 <= len(failed) <= 2 and engine.stats().num_failed_steps == 1
    for name, output in done.items():
        if name in failed:
            assert output.error == "RuntimeError: the device is on fire"
        else:
            assert output.error is None and output.outputs[0].token_ids == continue_greedily(prompts[name], 5)


def test_a_form_that_fails_ends_its_own_request(monkeypatch):
    engine = make_engine()
    engine.add_request("a", [1], greedy(5))
    engine.add_request("b", [2], greedy(5))

    class Broken:
        failure = None
        is_terminated = False

        def bitmask(self):
            raise ValueError("no such form")

    engine.core.scheduler.waiting[0].structured = Broken()
    done = finish(engine)
    assert done["a"].error == "ValueError: no such form" and done["a"].outputs[0].finish_reason == "error"
    assert done["b"].outputs[0].token_ids == continue_greedily([2], 5) and not engine.stats().num_failed_steps


def test_embeddings_are_the_last_hidden_row_at_length_one():
    prompts = [[1, 2, 3], list(range(20)), [1, 2, 3]]
    outputs = LLM(FakeCompiled(is_fast=True)).embed(prompt_token_ids=prompts, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = hidden_after(sums_of(rows_of(prompt))[-1])
        np.testing.assert_allclose(output.embedding, expected / np.linalg.norm(expected), rtol=1e-6)
        assert output.prompt_token_ids == tuple(prompt)
    with pytest.raises(UserError, match="has no embeddings"):
        LLM(FakeCompiled(hidden_size=0)).embed(prompt_token_ids=[[1]])
    engine = make_engine()
    engine.add_request("e", [1], PoolingParams())
    (output,) = engine.abort_request("e")
    assert output.finished and not engine.has_unfinished_requests()


def test_metrics_and_counts_tell_what_happened():
    clock = Clock()
    engine = make_engine(clock)
    engine.add_request("a", [1, 2, 3], greedy(3, n=2))
    clock.now += 1
    done = finish(engine)
    metrics = done["a"].metrics
    assert metrics.arrival == 100 and metrics.first_token == metrics.finished == 101 and metrics.first_scheduled
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (6, 6)
    assert stats.computed_tokens == engine.compiled.num_tokens and stats.padding_tokens > 0
    assert stats.num_steps >= 4 and stats.last_iteration_tokens >= 1 and stats.num_compiles == 0


def test_the_clock_of_the_device_counts_gaps_and_guesses_late_ends():
    clock = DeviceClock()
    clock.start("k", 10.0)
    clock.see(False, 10.5)
    clock.end(11.0)  # the host waited, so this is the end
    clock.start("k", 11.25)
    assert (clock.busy_s, clock.idle_s) == (1.0, 0.25)
    clock.see(False, 11.5)
    clock.see(True, 14.0)  # late: it began at 11.25 and never took less than 1.0
    clock.end(14.5)
    clock.start("k", 15.0)
    assert (clock.busy_s, clock.idle_s) == (2.0, 0.25 + 2.75)
    clock.start("k", 15.5)  # given while another runs: no gap
    clock.end(16.0)
    clock.end(17.0)
    assert (clock.busy_s, clock.idle_s) == (4.0, 3.0)


def test_a_stop_string_frees_all_at_once_though_a_step_is_under_way():
    engine = make_engine(fields={"tokenizer": CharTokenizer()})
    expected = continue_greedily([1, 2], 8)
    stop = CharTokenizer().decode(expected[2:4])
    engine.add_request("a", [1, 2], greedy(20, stop=stop))
    while not (outputs := engine.step()) or not outputs[0].finished:
        pass
    engine.check_integrity()
    assert outputs[0].outputs[0].token_ids == expected[:4] and outputs[0].outputs[0].stop_reason == stop
    assert engine.stats().kv_cache_usage == 0 and engine.compiled.num_tokens == 2 + 4


def test_the_next_step_starts_before_anybody_looks_at_text():
    log = []

    class Tokenizer(CharTokenizer):
        def decode(self, ids):
            log.append("text")
            return super().decode(ids)

    compiled = FakeCompiled(is_fast=True, tokenizer=Tokenizer(), fails=lambda inputs: log.append("step"))
    LLM(compiled).generate(["abc"], greedy(4), use_tqdm=False)
    assert log == ["step", "step", "text", "step", "text", "step", "text", "text"]


def test_a_wrong_request_is_refused_and_leaves_nothing():
    engine = make_engine()
    with pytest.raises(UserError, match="deadline_s must be at least 0"):
        engine.add_request("r", [1], greedy(1), deadline_s=float("nan"))
    assert not engine.has_unfinished_requests()
    engine.check_integrity()


def test_workers_turn_text_into_ids():
    compiled = FakeCompiled(is_fast=True, tokenizer=CharTokenizer())
    engine = LLMEngine.from_engine_args(EngineArgs(compiled, num_workers=2))
    texts = ["abc", "hello", "z"]
    outputs = engine.generate(texts, greedy(3))
    for text, output in zip(texts, outputs, strict=True):
        assert output.outputs[0].token_ids == continue_greedily(CharTokenizer().encode(text), 3)
    with pytest.raises(UserError, match="prompt 1: the prompt is empty"):
        engine.generate(["a", ""], greedy(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_batch": 0}, "min_batch must be an integer of at least 1"),
        ({"min_batch": 4}, "needs batch_timeout_ms"),
        ({"min_batch": 4, "max_batch": 2, "batch_timeout_ms": 5}, "min_batch must be at most max_batch"),
        ({"batch_timeout_ms": float("nan")}, "batch_timeout_ms must be a finite number"),
        ({"max_batch": 5}, "max_batch must be at most max_num_seqs, got 5 and 4"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0"),
        ({"swap_space": 1.5}, "swap_space must be an integer of at least 0"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching must be True or False"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LLM(FakeCompiled(), **options)


def test_a_pool_that_cannot_hold_one_request_is_refused():
    with pytest.raises(UserError, match="num_pages must be at least 6"):
        LLMEngine(FakeCompiled(num_pages=5))


def test_shapes_prefer_one_wide_step_to_many_and_leave_out_what_is_too_wide():
    shapes = Shapes(Buckets(((16, 1), (64, 1), (64, 8)), (1, 8)), is_ragged=True, min_first_chunk=1, max_tokens=100)
    assert shapes.max_tokens == 64
    assert shapes._cost_of_rest(60) == 128 and shapes._cost_of_rest(16) == 80 and shapes._cost_of_rest(0) == 0
    assert shapes._cost_of_rest(1_000_000) > 1_000_000


def test_pages_that_lower_requests_share_are_had_by_putting_all_of_them_out():
    engine = make_engine(fields={"max_model_len": 128, "page_size": 16, "num_pages": 10})
    engine.add_request("low", [k % 32 for k in range(81)], greedy(14, n=2), priority=5)
    for _ in range(14):
        engine.step()
    engine.add_request("high", [k % 32 for k in range(1, 86)], greedy(2))
    done = finish(engine)
    assert list(done) == ["high", "low"] and engine.stats().num_preemptions == 2
    assert done["low"].outputs[1].token_ids == continue_greedily([k % 32 for k in range(81)], 14)


def test_pinned_steps_have_two_shapes_and_one_sampler_whatever_runs():
    found = {}
    for pins in (True, False):
        compiled = FakeCompiled(decode_rows=(1, 2), prefill_buckets=(4, 8))
        engine = LLMEngine(compiled, options=CoreOptions(pins_buckets=pins))
        for name in range(6):
            params = SamplingParams(temperature=name % 2, seed=name, max_tokens=5)
            engine.add_request(str(name), [(3 * name + i) % 30 for i in range(1 + 3 * name)], params)
            engine.step()
        engine.generate([[1, 2, 3]] * 2, SamplingParams(temperature=0, max_tokens=3))
        while engine.has_unfinished_requests():
            engine.step()
        found[pins] = compiled.shapes, engine.stats().prefix_cache_queries
    assert found[True] == ({(8, 1, "full", False), (4, 4, "full", False)}, 0)
    assert len(found[False][0]) > 4 and found[False][1]
