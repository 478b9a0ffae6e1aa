"""OpenVINO GenAI: its pipeline with either of its attention backends, timed by the stamps that it keeps of tokens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.worker import TEMPERATURE, TOP_K


class Engine:
    """One pipeline on the CPU."""

    def __init__(
        self,
        model: str,
        threads: int,
        max_len: int,
        cache_tokens: int,
        max_seqs: int,
        attention: str = "PA",
        properties: dict[str, str] | None = None,
    ):
        """Args: attention: `PA`, over pages with continuous batching, or `SDPA`, over one cache of all rows."""
        self._model = model
        self._properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            **(properties or {}),
        }
        self._settings = {"threads": threads, "attention": attention, **self._properties}
        extra: dict[str, Any] = {"ATTENTION_BACKEND": attention}
        if attention == "PA":
            scheduler = genai.SchedulerConfig()
            scheduler.max_num_batched_tokens, scheduler.max_num_seqs = max_len, max_seqs
            scheduler.num_kv_blocks = -(-cache_tokens // 32) + 2 * max_seqs
            scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = False, True
            extra["scheduler_config"] = scheduler
        self._pipeline = genai.LLMPipeline(model, "CPU", {**self._properties, **extra})
        self.vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]

    def about(self) -> dict[str, Any]:
        return {
            "version": genai.get_version(),
            "build": f"wheel; {ov.get_version()}; {ov.Core().get_property('CPU', 'FULL_DEVICE_NAME')}",
            "settings": self._settings,
        }

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        metrics = self._generate(prompts, steps + 1).perf_metrics.raw_metrics
        found = list(zip(metrics.m_new_token_times, metrics.m_batch_sizes, strict=True))
        whole = [when for when, size in found if size == len(prompts)]
        if len(whole) < 3:
            raise RuntimeError(f"no {len(prompts)} prompts ran together: steps of {[size for _, size in found]}")
        return (whole[-1] - whole[1]) / (len(whole) - 2) / 1e3

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self._generate([prompt], 1)
        return time.perf_counter() - start

    def logits(self, prompt: list[int]) -> Any:
        core = ov.Core()
        compiled = core.compile_model(str(Path(self._model) / "openvino_model.xml"), "CPU", self._properties)
        request, count = compiled.create_infer_request(), len(prompt)
        values = {
            "input_ids": np.array([prompt], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in compiled.inputs for name in port.names}
        found = request.infer({name: value for name, value in values.items() if name in names})
        return found[compiled.output(0)][0, -1]

    def _generate(self, prompts: list[list[int]], count: int) -> Any:
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = count, True
        config.do_sample, config.top_k, config.temperature = True, TOP_K, TEMPERATURE
        return self._pipeline.generate(inputs, config)
