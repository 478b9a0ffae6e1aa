"""A step is given to the device before anybody has seen what the one before drew, where nothing else is to be known."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt_jax.engine.core_options import CoreOptions
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.engine.runner import Runner
from fastgpt_jax.sampling.params import SamplingParams
from tests.engine.fake import FakeCompiled, continue_greedily

BASE = [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
GREEDY = SamplingParams(temperature=0, max_tokens=8)
DRAWN = SamplingParams(temperature=1.5, top_p=0.9, max_tokens=8, seed=3)


def make_engine(**fields):
    compiled = FakeCompiled(**{"is_fast": True, "decode_rows": (1, 2), **fields})
    return LLMEngine(compiled, options=CoreOptions(poison_freed_pages=True))


def finish(engine):
    done = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = [(c.token_ids, c.finish_reason, c.logprobs) for c in output.outputs]
        engine.check_integrity()
    assert engine.stats().kv_cache_usage == 0
    return done


def watch(engine, monkeypatch):
    """Returns what is to be a list of 'ahead' and 'after', one for each step of single tokens."""
    seen, step = [], engine.compiled.step
    ids = []

    def watched(state, inputs, sampler, **how):
        if len(inputs.tokens) == len(inputs.num_new):
            seen.append("ahead" if any(inputs.tokens is one for one in ids) else "after")
        outputs, state = step(state, inputs, sampler, **how)
        ids.append(outputs.ids)
        return outputs, state

    monkeypatch.setattr(engine.compiled, "step", watched, raising=False)
    return seen


@pytest.mark.parametrize(
    ("params", "is_ahead"),
    [
        (GREEDY, True),
        (DRAWN, True),
        (SamplingParams(temperature=1, logit_bias={3: 2.0}, max_tokens=8), True),
        (SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=8), False),
        (SamplingParams(temperature=1, presence_penalty=0.5, max_tokens=8), False),
        (SamplingParams(temperature=1, min_tokens=8, max_tokens=8), False),
    ],
    ids=["greedy", "drawn", "bias", "repetition", "presence", "min_tokens"],
)
def test_decodes_run_ahead_where_the_sampler_looks_at_no_token(params, is_ahead, monkeypatch):
    engine = make_engine()
    seen = watch(engine, monkeypatch)
    engine.add_request("r", BASE, params)
    finish(engine)
    assert seen == ["after", *["ahead" if is_ahead else "after"] * 6]  # the prompt has another shape


def test_a_request_that_comes_or_goes_ends_the_run_ahead_and_the_next_begins(monkeypatch):
    engine = make_engine()
    seen = watch(engine, monkeypatch)
    engine.add_request("x", BASE, SamplingParams(temperature=0, max_tokens=12))
    engine.add_request("y", BASE[:5], SamplingParams(temperature=0, max_tokens=4))
    done = finish(engine)
    assert [done[name][0][0] for name in "xy"] == [continue_greedily(BASE, 12), continue_greedily(BASE[:5], 4)]
    assert seen.count("ahead") >= 8


def test_a_token_too_many_is_dropped_where_a_request_ended_before():
    engine = make_engine()
    tokens = continue_greedily(BASE, 8)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    num = tokens.index(stop) + 1
    engine.add_request("r", BASE, SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[stop]))
    assert finish(engine) == {"r": [(tokens[:num], "stop", None)]}
    # One row was computed for nobody; the pages that are known by name hold nothing of it.
    assert engine.compiled.num_tokens == len(BASE) + num
    engine.add_request("again", [*BASE, *tokens[:num]], GREEDY)
    assert finish(engine)["again"][0][0] == continue_greedily([*BASE, *tokens[:num]], 8)


@pytest.mark.parametrize("form", ["ragged", "rectangular"])
def test_draws_are_those_of_an_engine_that_looks_at_every_token(form, monkeypatch):
    rng = np.random.default_rng(0)
    requests = []
    for name in range(24):
        prompt = rng.integers(0, 30, rng.integers(1, 12)).tolist()
        params = SamplingParams(
            temperature=[0.0, 0.8, 2.0][name % 3],
            top_k=int(rng.integers(0, 5)),
            min_tokens=int(rng.integers(0, 3)),
            stop_token_ids=[int(rng.integers(30))],
            presence_penalty=[0.0, 0.0, 0.7][name % 3] if name % 2 else 0.0,
            logprobs=2,
            seed=name,
            n=1 + name % 2,
            max_tokens=int(rng.integers(2, 12)),
        )
        requests.append((str(name), prompt, params))

    def run():
        engine = make_engine(form=form)
        done = {}
        for index, request in enumerate(requests):
            engine.add_request(*request)
            if index % 5 == 4:
                done |= finish(engine)
        return done | finish(engine)

    found = run()
    monkeypatch.setattr(Runner, "following", lambda *_: None)
    assert run() == found


def test_rows_stay_where_they_are_when_others_end(monkeypatch):
    engine = make_engine(decode_rows=())
    seen = watch(engine, monkeypatch)
    prompts = [BASE[:5], BASE[:4], BASE[:3]]
    for name, prompt in enumerate(prompts):
        engine.add_request(str(name), prompt, SamplingParams(temperature=0, max_tokens=4 + 4 * name))
    done = finish(engine)
    for name, prompt in enumerate(prompts):
        assert done[str(name)][0][0] == continue_greedily(prompt, 4 + 4 * name)
    assert len(seen) > 10 and "after" not in seen[-10:]
