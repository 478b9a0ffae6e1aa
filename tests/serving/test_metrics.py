"""The metrics have vLLM's names, parse, and say what happened."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.serving.async_llm import AsyncLLM, Overloaded
from fastgpt_jax.serving.metrics import ServerMetrics, make_router
from fastgpt_jax.serving.metrics_histogram import TTFT_S, Histogram, token_buckets
from tests.serving.scripted_engine import ScriptedEngine

VLLM = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"),
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens"),
    *("request_success", "time_to_first_token_seconds", "inter_token_latency_seconds", "iteration_tokens_total"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
    "request_generation_tokens",
)
STEP_S = 0.004


async def run(llm, request_id, max_tokens=5, leave_after=None):
    params = SamplingParams(max_tokens=max_tokens)
    async with contextlib.aclosing(llm.generate(request_id, [1, 2, 3], params)) as outputs:
        async for output in outputs:
            if len(output.outputs[0].token_ids) == leave_after:
                return


@pytest.fixture(scope="module")
def served():
    """A server after three requests, one that was left and one that was refused; and its engine."""
    engine = ScriptedEngine(max_num_seqs=2, before_step=lambda engine: time.sleep(STEP_S))
    engine.num_compiles = 7
    llm = AsyncLLM(engine, max_queue_len=1, max_queued_tokens=100, model_name="tiny")
    metrics = ServerMetrics(llm)

    async def body():
        await asyncio.gather(*(run(llm, f"r{index}") for index in range(3)))
        await run(llm, "left", max_tokens=40, leave_after=3)
        results = await asyncio.gather(*(run(llm, f"many{index}") for index in range(4)), return_exceptions=True)
        assert sum(isinstance(result, Overloaded) for result in results) == 1
        while llm.stats().num_running:
            await asyncio.sleep(0.01)

    asyncio.run(body())
    app = FastAPI()
    app.include_router(make_router(metrics))
    yield TestClient(app), engine, metrics
    asyncio.run(llm.close())


def scrape(client):
    """Returns value by sample name and labels, without those that every sample has."""
    samples = {}
    for family in parse(client.get("/metrics").text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            samples[sample.name, *labels.values()] = sample.value
    return samples


def test_the_names_are_vllms_and_nothing_is_exported_that_nothing_counts(served):
    client, _, _ = served
    families = {family.name: family for family in parse(client.get("/metrics").text)}
    assert {f"vllm:{name}" for name in VLLM} == {name for name in families if name.startswith("vllm:")}
    for family in families.values():
        if family.name.startswith("vllm:"):
            assert all({"model_name", "engine"} <= set(sample.labels) for sample in family.samples), family.name
            assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)
    assert not [name for name in families if "spec_decode" in name or "lora" in name or "energy" in name]


def test_both_formats_parse(served):
    client, _, _ = served
    response = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert any(family.name == "vllm:request_success" for family in parse_openmetrics(response.text))
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_requests_are_counted(served):
    samples = scrape(served[0])
    assert samples["vllm:request_success_total", "length"] == 6
    assert samples["vllm:request_success_total", "abort"] == 1
    assert samples["fastgpt_requests_refused_total", "overloaded"] == 1
    assert samples["vllm:prompt_tokens_total",] == 7 * 3
    assert samples["vllm:request_prompt_tokens_count",] == 6 and samples["vllm:request_prompt_tokens_sum",] == 18
    assert samples["vllm:request_generation_tokens_sum",] == 30
    # Each token but the first of a request is a gap: four of the whole ones, two of the one that was left at least.
    assert samples["vllm:inter_token_latency_seconds_count",] >= 6 * 4 + 2
    assert samples["vllm:inter_token_latency_seconds_sum",] >= 26 * STEP_S


def test_times_add_up(served):
    samples = scrape(served[0])
    names = ("queue", "prefill", "decode")
    queue, prefill, decode = (samples[f"vllm:request_{name}_time_seconds_sum",] for name in names)
    assert decode >= 6 * 4 * STEP_S and samples["vllm:request_decode_time_seconds_count",] == 6
    assert samples["vllm:time_to_first_token_seconds_sum",] == pytest.approx(queue + prefill)
    assert samples["vllm:time_to_first_token_seconds_count",] == 7
    mean = samples["vllm:request_time_per_output_token_seconds_sum",]
    assert mean == pytest.approx(decode / 4, rel=1e-6)
    bounds = {float(key[1]) for key in samples if key[0] == "vllm:time_to_first_token_seconds_bucket"}
    assert bounds == {*TTFT_S, float("inf")}


def test_compilations_count_from_ready_on(served):
    client, engine, metrics = served
    assert scrape(client)["fastgpt_compile_total",] == 0, "what was compiled while loading is not counted"
    engine.num_compiles += 2
    nudge(metrics)
    assert scrape(client)["fastgpt_compile_total",] == 2


def nudge(metrics):
    """Has the engine's thread look at its counts again."""
    metrics._llm._thread.submit(lambda: None)
    time.sleep(0.05)


def test_a_histogram_counts_up_to_and_with_its_bounds():
    histogram = Histogram((1.0, 2.0))
    for value, times in ((1.0, 1), (1.5, 2), (9.0, 1)):
        histogram.observe(value, times)
    assert histogram.cumulative() == [("1.0", 1.0), ("2.0", 3.0), ("+Inf", 4.0)] and histogram.total == 13.0
    assert token_buckets(60) == (1, 2, 5, 10, 20, 50) and token_buckets(7) == (1, 2, 5)
