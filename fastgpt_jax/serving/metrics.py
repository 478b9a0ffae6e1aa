"""What a running server counts, in vLLM's names where vLLM has one, so that dashboards and load tools fit as they are.

Knows the engine's counts and a request's times, no HTTP but its own route. The one idea: what happens is counted once,
where it happens and on the engine's thread; Prometheus' families are made of it when somebody asks. What nothing
counts is not exported: no speculative decoding, no adapters, no energy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fastgpt_jax.engine.stats import EngineStats
from fastgpt_jax.serving.async_llm import AsyncLLM
from fastgpt_jax.serving.engine_thread import StepRecord
from fastgpt_jax.serving.metrics_histogram import (
    ITERATION_TOKENS,
    REQUEST_S,
    TOKEN_S,
    TTFT_S,
    Histogram,
    token_buckets,
)

ENGINE = "0"
"""The label `engine`: there is one in a process."""

REQUEST_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": (TTFT_S, "From arrival to the first token."),
    "vllm:inter_token_latency_seconds": (TOKEN_S, "Between two tokens of a sequence."),
    "vllm:request_time_per_output_token_seconds": (TOKEN_S, "Mean time of a token after the first, by request."),
    "vllm:e2e_request_latency_seconds": (REQUEST_S, "From arrival to the end."),
    "vllm:request_queue_time_seconds": (REQUEST_S, "From arrival to the first step."),
    "vllm:request_prefill_time_seconds": (REQUEST_S, "From the first step to the first token."),
    "vllm:request_decode_time_seconds": (REQUEST_S, "From the first token to the end."),
}
COUNTERS = {
    "vllm:prefix_cache_queries": ("prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_cache_hits", "Tokens found in the prefix cache."),
    "vllm:num_preemptions": ("num_preemptions", "Times a sequence lost its pages to another."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that began."),
    "vllm:generation_tokens": ("generation_tokens", "Tokens generated."),
    "fastgpt_swaps": ("num_swaps", "Preemptions that moved pages to the host."),
    "fastgpt_steps": ("num_steps", "Steps given to the device."),
    "fastgpt_failed_steps": ("num_failed_steps", "Steps that raised."),
    "fastgpt_computed_tokens": ("computed_tokens", "Tokens computed for a request."),
    "fastgpt_padding_tokens": ("padding_tokens", "Tokens computed for nobody, since steps have fixed shapes."),
    "fastgpt_device_seconds": ("device_time_s", "Time in which the device ran steps."),
    "fastgpt_device_idle_seconds": ("idle_gap_s", "Time in which the device waited for the host while there was work."),
}
"""Name without `_total` -> field of EngineStats, help."""
GAUGES = {
    "vllm:num_requests_running": ("num_running", "Sequences that run."),
    "vllm:num_requests_waiting": ("num_waiting", "Sequences that wait."),
    "vllm:kv_cache_usage_perc": ("kv_cache_usage", "Share of the pages that requests refer to; 1 is all of them."),
    "fastgpt_memory_fragmentation": (
        "kv_cache_waste",
        "Share of the places in pages that requests hold without a row.",
    ),
    "fastgpt_num_requests_swapped": ("num_swapped", "Waiting sequences whose pages lie on the host."),
}


class ServerMetrics(Collector):
    """Counts the requests of one AsyncLLM, from the moment it is made: when all is loaded, before the first of them.

    Invariants: all but `collect` runs on the engine's thread; a request is in `_last_token_s` while it runs.
    """

    def __init__(self, llm: AsyncLLM):
        self._llm = llm
        self._labels = {"model_name": llm.model_name, "engine": ENGINE}
        self._times = {name: Histogram(bounds) for name, (bounds, _) in REQUEST_HISTOGRAMS.items()}
        most = llm.max_model_len
        self._prompt_tokens = Histogram(token_buckets(most))
        self._generation_tokens = Histogram(token_buckets(most))
        self._iteration_tokens = Histogram(ITERATION_TOKENS)
        self._finished: Counter[str] = Counter()
        self._last_token_s: dict[str, tuple[float, int]] = {}
        self._facts: list[Metric] = [_cache_config(llm.compiled, self._labels), *_artifact_facts(llm.compiled)]
        self._computed_before = llm.stats().computed_tokens
        self._compiles_before = llm.stats().num_compiles
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        llm.observe(self)

    def add(self, collector: Any) -> None:
        """Exports what another part counts, too."""
        self.registry.register(collector)

    # Called on the engine's thread.

    def on_step(self, record: StepRecord) -> None:
        """Counts a step and what came out of it."""
        num_tokens = record.stats.computed_tokens - self._computed_before
        self._computed_before = record.stats.computed_tokens
        if num_tokens:
            self._iteration_tokens.observe(num_tokens)
        for output in record.outputs:
            self._count(output, record.ended_s)

    def on_end(self, request_id: str, reason: str) -> None:
        """Counts a request that ended without a last output."""
        self._last_token_s.pop(request_id, None)
        self._finished[reason] += 1

    def _count(self, output: Any, now_s: float) -> None:
        completions = getattr(output, "outputs", ())
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        before = self._last_token_s.get(output.request_id)
        if before is None:
            self._count_first(output)
        elif num_tokens > before[1]:
            # Tokens of one step came together; those of several sequences each waited for it.
            num_new = num_tokens - before[1]
            gap_s = (now_s - before[0]) * min(len(completions) / num_new, 1.0)
            self._times["vllm:inter_token_latency_seconds"].observe(gap_s, num_new)
        if output.finished:
            self._last_token_s.pop(output.request_id, None)
            self._count_finished(output)
        elif before is None or num_tokens > before[1]:
            self._last_token_s[output.request_id] = (now_s, num_tokens)

    def _count_first(self, output: Any) -> None:
        times = output.metrics
        if times.first_token is None:
            return
        self._times["vllm:time_to_first_token_seconds"].observe(times.first_token - times.arrival)
        if times.first_scheduled is not None:
            self._times["vllm:request_queue_time_seconds"].observe(times.first_scheduled - times.arrival)
            self._times["vllm:request_prefill_time_seconds"].observe(times.first_token - times.first_scheduled)

    def _count_finished(self, output: Any) -> None:
        self._prompt_tokens.observe(len(output.prompt_token_ids))
        for completion in getattr(output, "outputs", ()):
            self._finished[completion.finish_reason or "stop"] += 1
            self._generation_tokens.observe(len(completion.token_ids))
        times = output.metrics
        if times.finished is None:
            return
        self._times["vllm:e2e_request_latency_seconds"].observe(times.finished - times.arrival)
        if times.first_token is None:
            return
        decode_s = times.finished - times.first_token
        self._times["vllm:request_decode_time_seconds"].observe(decode_s)
        for completion in getattr(output, "outputs", ()):
            if len(completion.token_ids) > 1:
                mean_s = decode_s / (len(completion.token_ids) - 1)
                self._times["vllm:request_time_per_output_token_seconds"].observe(mean_s)

    # Called by whoever asks.

    def collect(self) -> Iterator[Metric]:
        """Yields all families."""
        stats = self._llm.stats()
        for name, (field, text) in GAUGES.items():
            yield _gauge(name, text, getattr(stats, field), self._labels)
        for name, (field, text) in COUNTERS.items():
            yield _counter(name, text, [({}, getattr(stats, field))], self._labels)
        reasons = {"stop": 0, "length": 0, "abort": 0, **self._finished}
        finished = [({"finished_reason": reason}, count) for reason, count in reasons.items()]
        yield _counter("vllm:request_success", "Sequences that ended.", finished, self._labels)
        for name, (_, text) in REQUEST_HISTOGRAMS.items():
            yield _histogram(name, text, self._times[name], self._labels)
        yield _histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", self._prompt_tokens, self._labels)
        yield _histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", self._generation_tokens, self._labels
        )
        yield _histogram("vllm:iteration_tokens_total", "Tokens of a step.", self._iteration_tokens, self._labels)
        yield from self._ratios(stats)
        yield from self._facts

    def _ratios(self, stats: EngineStats) -> Iterator[Metric]:
        """Yields what is computed of the counts, and what the server knows besides the engine."""
        num_compiles = stats.num_compiles - self._compiles_before
        yield _counter("fastgpt_compile", "Programs compiled since the server is ready.", [({}, num_compiles)], {})
        refused = [({"reason": reason}, count) for reason, count in self._llm.num_refused.items()]
        yield _counter("fastgpt_requests_refused", "Requests turned away.", refused, {})
        num_tokens = stats.padding_tokens + stats.computed_tokens
        padding = stats.padding_tokens / num_tokens if num_tokens else 0.0
        yield _gauge("fastgpt_bucket_padding_ratio", "Share of padding in all tokens computed.", padding, {})
        busy_s = stats.device_time_s + stats.idle_gap_s
        utilization = stats.device_time_s / busy_s if busy_s else 0.0
        yield _gauge(
            "fastgpt_device_utilization",
            "Share of the time with work to do in which the device ran a step.",
            utilization,
            {},
        )
        yield _gauge("fastgpt_queue_seconds", "Expected wait of a request let in now.", self._llm.queue_s, {})


def make_router(metrics: ServerMetrics) -> APIRouter:
    """Returns the route `/metrics`."""
    router = APIRouter()

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def get_metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    return router


def _cache_config(compiled: Any, labels: Mapping[str, str]) -> Metric:
    """Facts of the page pool, in vLLM's words."""
    layout = compiled.layout
    facts = {
        "block_size": layout.page_size,
        "num_gpu_blocks": getattr(layout, "num_pages", compiled.max_num_seqs),
        "max_num_seqs": compiled.max_num_seqs,
        "max_model_len": compiled.max_model_len,
    }
    all_labels = {**labels, **{name: str(value) for name, value in facts.items()}}
    return _gauge("vllm:cache_config_info", "Facts of the page pool; block_size is tokens a page.", 1, all_labels)


def _artifact_facts(compiled: Any) -> Iterable[Metric]:
    """What an artifact says of itself and how long loading it took; nothing for what is none."""
    manifest = getattr(compiled, "manifest", None)
    if manifest is None:
        return
    made = manifest.environment
    mesh = "x".join(f"{name}{size}" for name, size in manifest.mesh_axes) or "1"
    labels = {"digest": manifest.model.digest, "jax": made.jax, "device": made.device_kind, "topology": mesh}
    yield _gauge("fastgpt_artifact_info", "What is served.", 1, labels)
    yield _gauge(
        "fastgpt_executable_load_seconds", "Time to make programs callable.", compiled.seconds["executables"], {}
    )
    parts = GaugeMetricFamily("fastgpt_load_seconds", "Time that loading the artifact took, by part.", labels=["part"])
    for part, seconds in compiled.seconds.items():
        parts.add_metric([part], seconds)
    yield parts


def _gauge(name: str, text: str, value: float, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(
    name: str, text: str, values: Iterable[tuple[Mapping[str, str], float]], labels: Mapping[str, str]
) -> Metric:
    rows = [({**labels, **own}, value) for own, value in values]
    names = list(rows[0][0]) if rows else list(labels)
    family = CounterMetricFamily(name, text, labels=names)
    for row, value in rows:
        family.add_metric([row[label] for label in names], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram, labels: Mapping[str, str]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), histogram.cumulative(), histogram.total)
    return family
