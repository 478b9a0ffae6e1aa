"""Ten thousand random operations leave the engine whole, and nothing held."""

from __future__ import annotations

import random

import pytest

from fastgpt_jax.artifact.cache_layout import Reach
from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.sampling.params import SamplingParams
from tests.engine.fake import FakeCompiled, continue_greedily

PROGRAMS = (
    {"form": "ragged"},
    {"form": "rectangular"},
    {"is_carried": True},
    {"form": "ragged", "num_pages": 14},
    {"form": "ragged", "num_pages": 14, "reach": Reach(6, 2)},
)
PARAMS = {(num, n): SamplingParams(temperature=0, max_tokens=num, n=n) for num in range(1, 10) for n in (1, 3)}


class _Random:
    """Draws operations and applies them."""

    def __init__(self, engine, seed):
        self.engine = engine
        self.random = random.Random(seed)
        self.expected = {}
        self.num_added = self.num_done = 0

    def apply(self):
        name = self.random.choices(["add", "step", "abort", "preempt"], [3, 4, 1, 1])[0]
        getattr(self, f"_{name}")()

    def _add(self):
        if len(self.expected) >= 12:
            return
        name = str(self.num_added)
        self.num_added += 1
        head = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8][: self.random.randrange(13)]
        prompt = head + [self.random.randrange(4) for _ in range(self.random.randrange(1, 9))]
        num, n = self.random.randrange(1, 10), self.random.choice([1, 1, 1, 3])
        self.engine.add_request(
            name,
            prompt,
            PARAMS[num, n],
            priority=self.random.randrange(2),
            deadline_s=self.random.choice([None, None, 1e9, 0.0]),
            cache_salt=self.random.choice(["", "", "b"]),
        )
        reach = self.engine.compiled.reach
        self.expected[name] = [continue_greedily(prompt, min(num, 24 - len(prompt)), reach)] * n

    def _step(self):
        for output in self.engine.step():
            expected = self.expected[output.request_id]
            for completion, tokens in zip(output.outputs, expected, strict=True):
                assert completion.token_ids == tokens[: len(completion.token_ids)]
                assert completion.finish_reason in (None, "length", "deadline")
            if output.finished:
                del self.expected[output.request_id]
                self.num_done += 1

    def _abort(self):
        if self.expected:
            name = self.random.choice(list(self.expected))
            (output,) = self.engine.abort_request([name, "nobody"])
            assert output.finished and not self.engine.abort_request(name)
            del self.expected[name]

    def _preempt(self):
        running = self.engine.core.scheduler.running
        if running:
            self.engine.core.preempt(self.random.choice(running), self.random.choice(["swap", "recompute"]))


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_random_operations_keep_the_engine_whole(program):
    compiled = FakeCompiled(is_fast=True, decode_rows=(1, 2), **program)
    engine = LLMEngine(compiled, options=CoreOptions(swap_bytes=2000, max_snapshots=4))
    operations = _Random(engine, seed=1)
    for _ in range(2500):
        operations.apply()
        engine.check_integrity()
    while engine.has_unfinished_requests():
        operations._step()
        engine.check_integrity()
    assert not operations.expected and operations.num_done > 100
    stats = engine.stats()
    assert stats.kv_cache_usage == 0 and stats.num_running == stats.num_waiting == stats.num_swapped == 0
    assert stats.num_preemptions > 50 and stats.num_swaps > 5 and not stats.num_failed_steps
    assert stats.computed_tokens == compiled.num_tokens
