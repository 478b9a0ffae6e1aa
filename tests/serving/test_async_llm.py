"""Requests await their outputs, are refused early, and never hold up the thread that steps."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest

from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.structured import CompilersBusy
from fastgpt_jax.serving import engine_thread, forms, running
from fastgpt_jax.serving.admission import Admission
from fastgpt_jax.serving.async_llm import Aborted, AsyncLLM, Draining, EngineDead, Overloaded, StepFailed
from fastgpt_jax.serving.prompts import encode_prompts
from fastgpt_jax.serving.running import Job
from tests.engine.fake import FakeCompiled, continue_greedily
from tests.serving.scripted_engine import ScriptedEngine


@contextlib.asynccontextmanager
async def serving(engine, max_queue_len=100, max_queued_tokens=10_000):
    llm = AsyncLLM(engine, max_queue_len=max_queue_len, max_queued_tokens=max_queued_tokens)
    try:
        yield llm
    finally:
        await llm.close()


async def collect(llm, request_id="a", prompt=(1, 2, 3), max_tokens=5, n=1, **options):
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return [output async for output in llm.generate(request_id, list(prompt), params, **options)]


async def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.005)


def test_many_requests_get_what_a_real_engine_generates():
    async def one(llm, index):
        params = SamplingParams(temperature=0, max_tokens=8)
        outputs = [output async for output in llm.generate(f"r{index}", [1, 2, 3 + index], params)]
        return outputs[-1].outputs[0].token_ids

    async def body():
        async with serving(LLMEngine(FakeCompiled(is_fast=True))) as llm:
            return await asyncio.gather(*(one(llm, index) for index in range(12)))

    assert asyncio.run(body()) == [continue_greedily([1, 2, 3 + index], 8) for index in range(12)]


def test_the_engine_is_touched_by_one_thread_that_is_not_the_loops():
    engine = ScriptedEngine()

    async def body():
        async with serving(engine) as llm:
            await asyncio.gather(*(collect(llm, f"r{index}") for index in range(5)))

    asyncio.run(body())
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


def test_a_slow_reader_holds_nobody_up_and_misses_no_token():
    engine = ScriptedEngine(before_step=lambda engine: time.sleep(0.001))

    async def slow(llm):
        seen = []
        async for output in llm.generate("slow", [1], SamplingParams(max_tokens=40)):
            seen.append(output)
            await asyncio.sleep(0.05)
        return seen

    async def body():
        async with serving(engine) as llm:
            task = asyncio.create_task(slow(llm))
            await collect(llm, "quick", max_tokens=40)
            num_steps = engine.num_steps
            return num_steps, await task

    num_steps, seen = asyncio.run(body())
    assert num_steps <= 42, "the quick one took no more steps than it needs"
    assert len(seen) < 10, "what was not fetched in time was overwritten"
    assert seen[-1].outputs[0].token_ids == tuple(range(40))


def test_leaving_the_iteration_aborts():
    engine = ScriptedEngine(before_step=lambda engine: time.sleep(0.002))

    async def body():
        async with serving(engine) as llm:
            async with contextlib.aclosing(llm.generate("left", [1], SamplingParams(max_tokens=60))) as outputs:
                async for _ in outputs:
                    break
            cancelled = asyncio.create_task(collect(llm, "cancelled", max_tokens=60))
            await until(lambda: "cancelled" in engine.requests)
            cancelled.cancel()
            await until(lambda: set(engine.aborted) == {"left", "cancelled"})
            assert llm.num_unfinished == 0 and not engine.requests

    asyncio.run(body())


def test_what_is_too_much_is_refused_before_it_is_queued():
    engine = ScriptedEngine(max_num_seqs=2, before_step=lambda engine: time.sleep(0.002))

    async def body():
        async with serving(engine, max_queue_len=1) as llm:
            tasks = [asyncio.create_task(collect(llm, f"r{index}", max_tokens=20)) for index in range(6)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [result for result in results if isinstance(result, Overloaded)]
            assert len(refused) == 3 and all(error.retry_after_s >= 1 for error in refused)
            assert "2 sequences wait" not in str(refused[0]) and "1 sequences wait" in str(refused[0])
            assert len(await collect(llm, "later")) > 0, "a place is free again"

    asyncio.run(body())


def test_queued_tokens_are_bounded_and_told_in_seconds():
    admission = Admission(max_running=8, max_queue_len=8, max_queued_tokens=100)
    admission.check(1, 10_000)  # nothing waits before it
    admission.add("a", 1, 90, max_tokens=210)
    with pytest.raises(Overloaded) as first:
        admission.check(1, 20)
    admission.rate.add(num_tokens=100, seconds=1.0)
    with pytest.raises(Overloaded) as second:
        admission.check(1, 20)
    assert (first.value.retry_after_s, second.value.retry_after_s) == (1, 3)  # 90 + 210 tokens at 100 a second
    admission.start("a")
    admission.check(1, 20)
    admission.remove("a")
    assert (admission.num_sequences, admission.num_queued_tokens, admission.queue_s) == (0, 0, 0.0)
    admission.add("left before its first token", 2, 50, max_tokens=5)
    admission.remove("left before its first token")
    assert (admission.num_sequences, admission.num_queued_tokens) == (0, 0)


def jobs_of(name, num_jobs, num_tokens=3):
    params = SamplingParams(max_tokens=2)
    return [Job(f"{name}{index}", None, [1] * num_tokens, params) for index in range(num_jobs)]


@pytest.mark.parametrize("limits", [{"max_queue_len": 1}, {"max_queued_tokens": 20}])
def test_a_request_of_many_prompts_is_let_in_whole_or_not_at_all(limits):
    goes_on = threading.Event()

    async def body():
        engine = ScriptedEngine(max_num_seqs=2, before_step=lambda engine: goes_on.wait(10))
        async with serving(engine, **limits) as llm:
            many = asyncio.create_task(running.collect(llm, jobs_of("many", 10)))
            await until(lambda: llm.num_unfinished == 10)
            with pytest.raises(Overloaded):
                await running.collect(llm, jobs_of("late", 2))
            assert llm.num_unfinished == 10 and llm.num_refused["overloaded"] == 1
            goes_on.set()
            assert all(output.finished for output in await many)
            assert len(await running.collect(llm, jobs_of("later", 10))) == 10, "all that was held is given back"

    asyncio.run(body())


def test_inputs_of_an_embedding_are_let_in_together():
    async def body():
        async with serving(LLMEngine(FakeCompiled(is_fast=True)), max_queue_len=0, max_queued_tokens=4) as llm:
            for _ in range(2):
                assert len(await llm.embed("e", [[1, 2, 3]] * 9)) == 9

    asyncio.run(body())


def test_a_request_that_cannot_be_served_is_the_users_mistake():
    async def body():
        slow = ScriptedEngine(max_model_len=8, before_step=lambda engine: time.sleep(0.02))
        async with serving(slow) as llm:
            with pytest.raises(UserError, match="the context holds 8"):
                await collect(llm, prompt=range(9))
            task = asyncio.create_task(collect(llm, "same"))
            await until(lambda: llm.num_unfinished == 1)
            with pytest.raises(UserError, match="in use"):
                await collect(llm, "same")
            await task
            assert llm.num_unfinished == 0

    asyncio.run(body())


def test_options_reach_the_engine_and_the_time_to_tokenise_counts():
    engine = ScriptedEngine()
    engine.before_step = lambda engine: seen.update(engine.requests["a"].options)
    seen = {}

    async def body():
        async with serving(engine) as llm:
            await collect(llm, priority=3, deadline_s=5.0, cache_salt="tenant")
            assert (seen["priority"], seen["cache_salt"]) == (3, "tenant") and 4.0 < seen["deadline_s"] < 5.0
            await collect(llm, deadline_s=1e-9)
            assert seen["deadline_s"] == 0.0, "a time that is up is not no time"

    asyncio.run(body())


def test_text_is_made_tokens_by_so_many_threads_as_were_asked_for():
    threads = set()

    async def body():
        llm = AsyncLLM(ScriptedEngine(), max_queue_len=10, max_queued_tokens=100, num_tokenisers=1)
        llm.tokenizer.encode = lambda text: threads.add(threading.current_thread().name) or [1]
        server = SimpleNamespace(llm=llm)
        await asyncio.gather(*(encode_prompts(server, "prompt", ["a" * 3000]) for _ in range(8)))
        await llm.close()

    asyncio.run(body())
    assert threads == {"tokeniser_0"}


class SlowForms:
    """Compiles when it is told to; remembers what it was asked."""

    def __init__(self):
        self.asked, self.made, self.goes_on = [], set(), threading.Event()

    def is_compiled(self, form):
        return form in self.made

    def compile(self, form):
        self.asked.append(form)
        self.goes_on.wait(10)
        if "b" in form.choice:
            raise CompilersBusy("all at work", 7)
        self.made.add(form)


def test_forms_that_compile_hold_up_no_other_request(monkeypatch):
    monkeypatch.setattr(forms, "MAX_COMPILING", 2)
    engine = ScriptedEngine()
    engine.forms = SlowForms()

    async def ask(llm, index, text):
        params = SamplingParams(max_tokens=2, structured_outputs={"choice": [text]})
        return [output async for output in llm.generate(f"{text}{index}", [1], params)][-1].finished

    async def body():
        async with serving(engine) as llm:
            tasks = [asyncio.create_task(ask(llm, index, "ab"[index // 3])) for index in range(6)]
            await until(lambda: len(engine.forms.asked) == 2)
            assert len(await asyncio.wait_for(collect(llm), 5)) >= 1
            with pytest.raises(Overloaded, match="2 forms of text compile"):
                await ask(llm, 0, "c")
            tasks[0].cancel()
            engine.forms.goes_on.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert await ask(llm, 9, "a") and len(engine.forms.asked) == 2
            return llm.num_refused["overloaded"], outcomes

    num_refused, outcomes = asyncio.run(body())
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, bool, bool] + [Overloaded] * 3
    assert outcomes[5].retry_after_s == 7 and num_refused == 4


def test_a_failing_step_fails_its_requests_and_not_the_server():
    def fail_once(engine):
        if engine.num_steps == 3 and not failed:
            failed.append(True)
            raise ValueError("device lost")

    failed = []

    async def body():
        async with serving(ScriptedEngine(before_step=fail_once)) as llm:
            with pytest.raises(StepFailed, match="ValueError") as told:
                await collect(llm)
            assert "device lost" not in str(told.value), "a client is told no internals"
            assert llm.is_alive and len((await collect(llm))[-1].outputs[0].token_ids) == 5

    asyncio.run(body())


def test_an_engine_that_keeps_failing_is_dead_and_says_so():
    def fail(engine):
        raise ValueError("device lost")

    async def body():
        async with serving(ScriptedEngine(before_step=fail)) as llm:
            outcomes = [await asyncio.gather(collect(llm), return_exceptions=True) for _ in range(4)]
            assert [type(outcome[0]) for outcome in outcomes] == [StepFailed, StepFailed, EngineDead, EngineDead]
            assert not llm.is_alive and not llm.is_ready

    asyncio.run(body())


def test_abort_by_id_ends_what_another_task_awaits():
    async def body():
        async with serving(ScriptedEngine(before_step=lambda engine: time.sleep(0.002))) as llm:
            task = asyncio.create_task(collect(llm, "a", max_tokens=60))
            await until(lambda: llm.stats().generation_tokens > 2)
            await llm.abort("a")
            last = (await task)[-1]
            assert last.finished and last.outputs[0].finish_reason == "abort" and last.outputs[0].token_ids
            await llm.abort("nobody")

        blocked = threading.Event()
        async with serving(ScriptedEngine(before_step=lambda engine: blocked.wait(5))) as llm:
            task = asyncio.create_task(collect(llm, "b"))
            await until(lambda: llm.num_unfinished == 1)
            await llm.abort("b")
            with pytest.raises(Aborted):
                await task
            blocked.set()

    asyncio.run(body())


def test_draining_finishes_what_runs_and_takes_nothing_new():
    engine = ScriptedEngine(before_step=lambda engine: time.sleep(0.005))

    async def body():
        async with serving(engine) as llm:
            task = asyncio.create_task(collect(llm, max_tokens=10))
            await until(lambda: llm.num_unfinished == 1)
            drained = asyncio.create_task(llm.drain(10))
            await until(lambda: llm.is_draining)
            assert not llm.is_ready
            with pytest.raises(Draining):
                await collect(llm, "late")
            assert await drained and len((await task)[-1].outputs[0].token_ids) == 10

        async with serving(engine) as llm:
            task = asyncio.create_task(collect(llm, max_tokens=60))
            await until(lambda: llm.num_unfinished == 1)
            assert not await llm.drain(0.02), "it would take longer"
            await llm.close()
            with pytest.raises(Draining):
                await task

    asyncio.run(body())
    assert not engine.requests


def test_another_event_loop_may_take_over():
    llm = AsyncLLM(ScriptedEngine(), max_queue_len=10, max_queued_tokens=100)
    for _ in range(3):
        assert len(asyncio.run(collect(llm))[-1].outputs[0].token_ids) == 5
    asyncio.run(llm.close())


def test_mail_that_a_closed_loop_has_not_fetched_holds_nobody_up():
    goes_on = threading.Event()
    engine = ScriptedEngine(before_step=lambda engine: goes_on.wait(10))
    llm = AsyncLLM(engine, max_queue_len=10, max_queued_tokens=100)

    async def leave():
        task = asyncio.create_task(collect(llm, "left"))
        await until(lambda: engine.requests)
        assert not task.done()

    asyncio.run(leave())
    goes_on.set()
    asyncio.run(until(lambda: engine.aborted == ["left"]))
    assert len(asyncio.run(asyncio.wait_for(collect(llm), 10))[-1].outputs[0].token_ids) == 5
    asyncio.run(llm.close())


def test_the_queue_is_measured_while_it_changes():
    admission = Admission(max_running=8, max_queue_len=8, max_queued_tokens=100)
    admission.rate.add(num_tokens=10, seconds=1.0)

    class Joined:
        num_expected = 0

        @property
        def num_queued_tokens(self):
            admission.add("b", 1, 10, max_tokens=0)
            return 10

    admission._held["a"] = Joined()
    assert admission.queue_s == 1.0


class Failing(FakeCompiled):
    """Fails a step that runs the prompt of all nines."""

    def step(self, state, inputs, sampler, **options):
        if 9 in inputs.tokens[:1]:
            raise ValueError("device lost")
        return super().step(state, inputs, sampler, **options)


def test_a_step_that_a_real_engine_comes_through_fails_the_request_and_no_more(caplog):
    async def body():
        async with serving(LLMEngine(Failing(is_fast=True, max_num_seqs=1))) as llm:
            params = SamplingParams(temperature=0, max_tokens=3)
            for _ in range(4):
                with pytest.raises(StepFailed) as told:
                    await collect(llm, "bad", [9, 9, 9])
                assert "device lost" not in str(told.value)
                outputs = [output async for output in llm.generate("good", [1, 2, 3], params)]
                assert outputs[-1].outputs[0].token_ids == continue_greedily([1, 2, 3], 3)
            assert llm.is_alive and llm.stats().num_failed_steps == 4 and llm.stats().kv_cache_usage == 0

    asyncio.run(body())
    assert "ValueError: device lost" in caplog.records[0].error


def test_a_device_that_fails_every_step_is_given_up(monkeypatch):
    monkeypatch.setattr(engine_thread, "MAX_FAILED_STEPS", 3)

    async def body():
        async with serving(LLMEngine(Failing(is_fast=True, max_num_seqs=1))) as llm:
            outcomes = [await asyncio.gather(collect(llm, prompt=[9, 9]), return_exceptions=True) for _ in range(4)]
            assert isinstance(outcomes[0][0], StepFailed) and isinstance(outcomes[-1][0], EngineDead)
            assert not llm.is_alive

    asyncio.run(body())


def test_embeddings_come_in_the_order_of_the_prompts():
    prompts = [[1, 2], [3, 4, 5], [6]]

    async def body():
        async with serving(LLMEngine(FakeCompiled(is_fast=True))) as llm:
            outputs = await llm.embed("e", prompts)
            assert [list(output.prompt_token_ids) for output in outputs] == prompts
            assert all(abs(float((output.embedding**2).sum()) - 1) < 1e-5 for output in outputs)
            with pytest.raises(UserError, match="outside the vocabulary"):
                await llm.embed("e", [*prompts, [10_000]])
            await until(lambda: llm.num_unfinished == 0 and llm.stats().num_running == 0)

    asyncio.run(body())
