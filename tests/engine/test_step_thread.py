"""Steps on a thread of their own: the same tokens, text that nobody waits for, errors that end what they must."""

from __future__ import annotations

import random
import threading
import time

import pytest

from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.engine.step_thread import MAX_BEHIND
from fastgpt_jax.sampling.params import SamplingParams
from tests.engine.fake import CharTokenizer, FakeCompiled, continue_greedily

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def make():
    engines = []

    def make(**fields):
        compiled = FakeCompiled(**{"is_fast": True, "decode_rows": (1, 2), **fields})
        engines.append(LLMEngine(compiled, options=CoreOptions(swap_bytes=2000)))
        engines[-1].start()
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_requests_that_come_go_and_are_left_get_the_tokens_they_have_alone(make):
    engine, rng = make(num_pages=14), random.Random(0)
    expected, num_done = {}, 0
    for name in map(str, range(60)):
        prompt, num, n = (
            [rng.randrange(30) for _ in range(rng.randrange(1, 14))],
            rng.randrange(1, 10),
            rng.choice([1, 3]),
        )
        engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=num, n=n), priority=rng.randrange(2))
        expected[name] = [continue_greedily(prompt, min(num, 24 - len(prompt)))] * n
        if rng.random() < 0.3:
            left = rng.choice(list(expected))
            del expected[left]
            engine.abort_request(left)
        for _ in range(rng.randrange(4)):
            if engine.has_unfinished_requests():
                num_done += check(engine.step(), expected)
    while engine.has_unfinished_requests():
        num_done += check(engine.step(), expected)
    engine.check_integrity()
    stats = engine.stats()
    assert not expected and num_done > 30
    assert stats.kv_cache_usage == 0 and stats.num_running == stats.num_waiting == stats.num_swapped == 0


def check(outputs, expected):
    """Takes what is finished from what is expected; returns how many there were."""
    done = [output for output in outputs if output.finished]
    for output in done:
        assert [c.token_ids for c in output.outputs] == expected.pop(output.request_id)
    return len(done)


def test_steps_go_on_while_text_is_made_and_wait_where_it_stays_behind(make):
    goes_on, threads = threading.Event(), set()

    class Slow(CharTokenizer):
        def decode(self, ids):
            threads.add(threading.get_ident())
            assert goes_on.wait(10)
            return super().decode(ids)

    engine = make(tokenizer=Slow(), max_model_len=64)
    engine.add_request("r", [1, 2, 3], SamplingParams(temperature=0, max_tokens=30))
    stepping = threading.Thread(target=engine.step)
    stepping.start()
    deadline = time.monotonic() + 10
    while engine._steps.ask(engine.core.stats).num_steps < MAX_BEHIND and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    num_steps = engine._steps.ask(engine.core.stats).num_steps
    assert MAX_BEHIND <= num_steps <= MAX_BEHIND + 2  # what is not taken, what is being told, and what is under way
    goes_on.set()
    stepping.join()
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert outputs[0].outputs[0].token_ids == continue_greedily([1, 2, 3], 30)
    assert threads <= {stepping.ident, threading.get_ident()}


def test_a_stop_string_ends_a_request_and_frees_its_pages(make):
    engine = make(tokenizer=CharTokenizer(), max_model_len=64)
    tokens = continue_greedily([1, 2, 3], 40)
    stop = CharTokenizer().decode(tokens[4:6])
    engine.add_request("r", [1, 2, 3], SamplingParams(temperature=0, max_tokens=40, stop=[stop]))
    while engine.has_unfinished_requests():
        (*_, output) = engine.step() or [None]
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].text == CharTokenizer().decode(tokens[:4])
    deadline = time.monotonic() + 10
    while engine.stats().kv_cache_usage and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.stats().kv_cache_usage == 0 and engine.stats().generation_tokens < 40


def test_an_error_that_the_loop_did_not_handle_is_told_once_and_ends_all_there_are(make, monkeypatch):
    engine = make()
    broken = threading.Event()
    end_overdue = engine.core._end_overdue

    def fail():
        if not broken.is_set():
            broken.set()
            raise LookupError("a bug")
        end_overdue()

    monkeypatch.setattr(engine.core, "_end_overdue", fail)
    engine.add_request("r", [1, 2, 3], GREEDY)
    with pytest.raises(LookupError, match="a bug"):
        engine.step()
    engine.abort_request("r")
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    engine.add_request("s", [1, 2, 3], GREEDY)
    done = {}
    while engine.has_unfinished_requests():
        done.update({o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished})
    assert done == {"s": continue_greedily([1, 2, 3], 8)}


def test_who_waits_for_a_step_can_be_called_away(make):
    engine = make(tokenizer=CharTokenizer())
    engine.add_request("r", [1, 2, 3], GREEDY)
    while engine.has_unfinished_requests():
        engine.step()
    waiting = threading.Thread(target=engine.step)  # for nobody
    waiting.start()
    engine.interrupt()
    waiting.join(10)
    assert not waiting.is_alive()


def test_what_ends_the_thread_is_told_to_all_who_wait_for_it(make):
    engine = make()
    engine.add_request("r", [1, 2, 3], GREEDY)

    def fail():
        raise SystemExit

    engine._steps.submit(fail)
    with pytest.raises(RuntimeError, match="has stopped: SystemExit"):
        while True:
            engine.step()
    engine.abort_request("r")
    with pytest.raises(RuntimeError, match="has stopped"):
        engine.stats()
