"""Greedy tokens are the same however they come about: alone or together, cached, in chunks, or after a preemption."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt_jax.artifact.cache_layout import Reach
from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.sampling.params import SamplingParams
from tests.engine.fake import FakeCompiled, continue_greedily

PROGRAMS = (
    {"form": "ragged"},
    {"form": "rectangular"},
    {"is_carried": True},
    {"form": "ragged", "reach": Reach(6, 2)},
    {"form": "rectangular", "reach": Reach(3)},
)
BASE = [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]
PROMPTS = [BASE[:13], [1], BASE[:12] + [9, 9]]
SWAP = 2**20


def make_engine(program, **options):
    fields = {"is_fast": True, "decode_rows": (1, 2), **program}
    return LLMEngine(FakeCompiled(**fields), options=CoreOptions(poison_freed_pages=True, **options))


def finish(engine, preempt=lambda engine: None):
    """Steps until all is done, checking everything; returns tokens by request."""
    done = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert all(c.finish_reason != "error" for c in output.outputs), output.error
            if output.finished:
                done[output.request_id] = [c.token_ids for c in output.outputs]
        preempt(engine)
        engine.check_integrity()
    assert engine.stats().kv_cache_usage == 0
    return done


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_preemption_at_any_step_changes_no_token(program, how):
    params = SamplingParams(temperature=0, max_tokens=6)
    expected = {str(i): [continue_greedily(p, 6, program.get("reach"))] for i, p in enumerate(PROMPTS)}
    num_preempted = 0
    for victim in range(len(PROMPTS)):
        for at in range(1, 40):
            engine = make_engine(program, swap_bytes=SWAP, enable_prefix_caching=bool(at % 2))
            for name, prompt in enumerate(PROMPTS):
                engine.add_request(str(name), prompt, params)
            num_steps = 0

            def preempt(engine, victim=victim, at=at):
                nonlocal num_steps
                num_steps += 1
                found = [r for r in engine.core.scheduler.running if r.group.request_id == str(victim)]
                if num_steps == at and found:
                    engine.core.preempt(found[0], how)

            assert finish(engine, preempt) == expected
            num_preempted += engine.stats().num_preemptions
            assert engine.stats().num_swaps == (engine.stats().num_preemptions if how == "swap" else 0)
            if num_steps < at:
                break
    assert num_preempted > 4 * len(PROMPTS)  # they run for six steps and more


@settings(max_examples=40)
@given(
    st.sampled_from(PROGRAMS),
    st.lists(st.tuples(st.integers(0, 16), st.lists(st.integers(0, 3), max_size=6), st.integers(1, 3)), max_size=7),
    st.data(),
)
def test_tokens_depend_on_nothing_but_the_prompt(program, requests, data):
    fields = {
        **program,
        "page_size": data.draw(st.sampled_from([1, 2, 4, 8])),
        "max_num_seqs": data.draw(st.integers(1, 5)),
        "min_first_chunk": data.draw(st.sampled_from([1, 3])),
        "max_num_batched_tokens": data.draw(st.sampled_from([1, 16, 64])),
    }
    least = -(-24 // fields["page_size"])
    fields["num_pages"] = data.draw(st.integers(least, 3 * least))
    engine = make_engine(
        fields,
        swap_bytes=data.draw(st.sampled_from([0, 200, SWAP])),
        enable_prefix_caching=data.draw(st.booleans()),
        max_num_batched_tokens=data.draw(st.sampled_from([None, 4])),
        max_snapshots=2,
    )
    expected = {}
    for name, (num_base, rest, n) in enumerate(requests):
        prompt = (BASE[:num_base] + rest)[:23] or [1]
        if len(prompt) >= fields["min_first_chunk"]:
            max_tokens = data.draw(st.integers(1, 12))
            engine.add_request(
                str(name),
                prompt,
                SamplingParams(temperature=0, max_tokens=max_tokens, n=n),
                priority=data.draw(st.integers(0, 1)),
                cache_salt=data.draw(st.sampled_from(["", "b"])),
            )
            num_tokens, reach = min(max_tokens, 24 - len(prompt)), fields.get("reach")
            expected[str(name)] = [continue_greedily(prompt, num_tokens, reach)] * n
        for _ in range(data.draw(st.integers(0, 2))):
            engine.step()

    # Requests that finished while others were added are of no interest here: their ends are checked elsewhere.
    for name, found in finish(engine).items():
        assert found == expected[name]


def test_the_caches_make_less_work():
    """The same prompt again, a longer one, and a third continuation compute only what is new."""
    engine = make_engine({"max_model_len": 64, "prefill_buckets": (4, 8, 16)})
    one = SamplingParams(temperature=0, max_tokens=1)
    counts = []
    for prompt in (BASE, BASE, BASE + [1, 2], BASE[:15], BASE[:4] + [1] * 8):
        before = engine.compiled.num_tokens
        engine.add_request("r", prompt, one)
        assert finish(engine) == {"r": [continue_greedily(prompt, 1)]}
        counts.append(engine.compiled.num_tokens - before)
    assert counts == [16, 1, 2, 3, 8]
    stats = engine.stats()
    assert stats.prefix_cache_hits == 15 + 16 + 12 + 4 and stats.prefix_cache_queries == 16 + 16 + 18 + 15 + 12


def test_pages_that_windows_left_behind_are_free_and_are_not_missed_in_a_prefix():
    reach = Reach(window=6, num_first=2)
    engine = make_engine({"max_model_len": 96, "prefill_buckets": (4, 8, 16), "num_pages": 26, "reach": reach})
    prompt = [(7 * i) % 31 for i in range(40)]
    held = []

    def watch(engine):
        held.append(round(engine.stats().kv_cache_usage * engine.compiled.layout.num_pages))

    for name, max_tokens in (("long", 50), ("same", 8)):
        before = engine.compiled.num_tokens
        engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
        assert finish(engine, watch) == {name: [continue_greedily(prompt, max_tokens, reach)]}
    assert held[-10:] and max(held[5:40]) <= 1 + 3  # of 10 to 22 pages that its tokens fill
    assert (
        engine.compiled.num_tokens - before == 8
    )  # its prompt was found, though only its end and its beginning lie there
    # Others may have taken the place of what lies between: a hit needs what the window can reach.
    prefixes = engine.core.scheduler.memory.prefixes
    engine.add_request("other", prompt[::-1], SamplingParams(temperature=0, max_tokens=50))
    finish(engine)
    assert len(prefixes.named) <= 26


def test_continuations_share_the_prompt_and_copy_the_page_they_go_on_writing():
    engine = make_engine({"max_model_len": 64, "prefill_buckets": (4, 8, 16)}, enable_prefix_caching=False)
    engine.add_request("r", BASE[:14], SamplingParams(temperature=0, max_tokens=3, n=4))
    most = 0

    def watch(engine):
        nonlocal most
        most = max(most, round(engine.stats().kv_cache_usage * engine.compiled.layout.num_pages))

    assert finish(engine, watch) == {"r": [continue_greedily(BASE[:14], 3)] * 4}
    assert engine.compiled.num_tokens == 14 + 3 * 1 + 4 * 2  # the prompt, its last token for the others, answers
    assert most <= 3 + 4 * 2  # full pages once; the page that is written, and perhaps one more, four times


def test_places_without_a_row_are_told():
    engine = make_engine({"max_model_len": 64})
    engine.add_request("r", BASE[:5], SamplingParams(temperature=0, max_tokens=9))
    assert engine.stats().kv_cache_waste == 0
    engine.step()
    running, num_free = engine.core.scheduler.running, 2 * 4 - engine.core.scheduler.running[0].num_computed
    assert len(running[0].pages) == 2 and engine.stats().kv_cache_waste == num_free / 8 > 0
    finish(engine)
    assert engine.stats().kv_cache_waste == 0


def test_a_salt_keeps_tenants_apart():
    engine = make_engine({})
    params = SamplingParams(temperature=0, max_tokens=1)
    for salt, hits in (("a", 0), ("b", 0), ("a", 12)):
        before = engine.stats().prefix_cache_hits
        engine.add_request("r", BASE[:13], params, cache_salt=salt)
        finish(engine)
        assert engine.stats().prefix_cache_hits - before == hits


def test_a_carried_program_goes_on_from_snapshots_alone():
    engine = make_engine({"is_carried": True}, max_snapshots=1)
    params = SamplingParams(temperature=0, max_tokens=1)
    cached = []
    for prompt in (BASE[:10], BASE[:9] + [1], [7] * 6, BASE[:10]):
        engine.add_request("r", prompt, params)
        (output,) = [o for _ in range(9) for o in engine.step() if o.finished][:1] or [None]
        assert output.outputs[0].token_ids == continue_greedily(prompt, 1)
        cached.append(output.metrics.num_cached_tokens)
    # The third prompt's snapshot takes the place of the only one there may be.
    assert cached == [0, 8, 0, 0]


def test_rows_on_the_host_take_no_more_than_they_may():
    engine = make_engine({"page_size": 2}, swap_bytes=64)
    for name in ("x", "y"):
        engine.add_request(name, [1, 2], SamplingParams(temperature=0, max_tokens=8))
    engine.step()
    engine.step()
    for request in list(engine.core.scheduler.running):
        engine.core.preempt(request, "swap")
    saved = [request.saved for request in engine.core.scheduler.waiting if request.saved is not None]
    num_bytes = sum(array.nbytes for one in saved for group in one.pages for array in group)
    assert len(saved) == 1 and num_bytes <= 64
    assert {name: len(tokens[0]) for name, tokens in finish(engine).items()} == {"x": 8, "y": 8}
