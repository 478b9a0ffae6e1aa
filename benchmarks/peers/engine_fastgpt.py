"""Ours: `LLM(artifact)` as users run it; beside it the bare step, and what the artifact computes against float32.

The one idea: what is compared with other engines includes scheduler, sampler and detokenizer; the bare step is named
apart and only says where the time goes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peers.worker import TEMPERATURE, TOP_K, make_prompt
from fastgpt_jax.artifact.loading import load_artifact
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.kernels.cpu import library
from fastgpt_jax.sampling.params import SamplingParams
from fastgpt_jax.sampling.step_io import StepInputs


class Engine:
    """One artifact."""

    def __init__(self, model: str, threads: int):
        """Args: threads: Told for the record; XLA takes as many as the process may run on."""
        self._folder = Path(model)
        self._served = load_artifact(model, verify="fast", on_mismatch="refuse")
        self._llm = LLM(self._served, enable_prefix_caching=False)
        self.vocab_size = self._served.vocab_size
        self._settings = {"threads": threads}

    def about(self) -> dict[str, Any]:
        manifest, layout = self._served.manifest, self._served.layout
        called = f"interface {manifest.environment.cpu_kernels}" if manifest.environment.cpu_kernels else "none"
        return {
            "version": f"{version('fastgpt-jax')} on jax {jax.__version__}",
            "build": f"native kernels, {library.unusable_reason() or library.isa()}; the artifact calls {called}",
            "settings": {
                **self._settings,
                "artifact": self._folder.name,
                "page_size": layout.page_size,
                "num_pages": layout.num_pages,
                "buckets": [list(pair) for pair in self._served.buckets.prefill],
            },
        }

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """From when every prompt has its second token until the first of them is done: all of them run together."""
        times: list[list[float]] = [[] for _ in prompts]
        # Enough tokens that prompts which are read one after the other still run together for `steps`.
        for index, output in self._llm.stream(prompt_token_ids=prompts, sampling_params=_sampled(steps + len(prompts))):
            now = time.perf_counter()
            times[index] += [now] * (len(output.outputs[0].token_ids) - len(times[index]))
        return seconds_a_step(times)

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        for _ in self._llm.stream(prompt_token_ids=[prompt], sampling_params=_sampled(1)):
            break
        return time.perf_counter() - start

    def bare_decode(self, batch: int, prompt: int, steps: int) -> float:
        """Seconds of a greedy step of this many rows at this context, nothing but the executable between two."""
        served, layout = self._served, self._served.layout
        pages = layout.num_pages // batch
        state = served.init_state()
        per_request = -(-served.max_model_len // layout.page_size)
        table = np.zeros((batch, per_request), np.int32)
        used = min(pages, per_request)
        table[:, :used] = np.arange(batch * used, dtype=np.int32).reshape(batch, used)
        ids: Any = np.full(batch, 7, np.int32)
        start = 0.0
        for index in range(steps + 1):
            if index == 1:
                jax.block_until_ready(state)
                start = time.perf_counter()
            rows = np.full(batch, prompt + index, np.int32)
            ones, slots = np.ones(batch, np.int32), np.arange(batch, dtype=np.int32)
            inputs = StepInputs(ids, ones, table, rows, slots, np.zeros(batch, np.int32))
            outputs, state = served.step(state, inputs, None, variant="greedy")
            ids = np.asarray(outputs.ids)
        return (time.perf_counter() - start) / steps

    def logits(self, prompt: list[int]) -> Any:
        """Log-probabilities after the prompt: -inf but for the likeliest ones, which are all that an artifact tells."""
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=self._served.max_logprobs, ignore_eos=True)
        (output,) = self._llm.generate(prompt_token_ids=[prompt], sampling_params=params, use_tqdm=False)
        found = (output.outputs[0].logprobs or [{}])[0]
        values = np.full(self.vocab_size, -np.inf, np.float32)
        for token_id, logprob in found.items():
            values[token_id] = logprob.logprob
        return values

    def check(self, source: str, tokens: int, texts: int, build: Mapping[str, Any]) -> dict[str, Any]:
        """Against the model's forward in float32, in this process: what is served, and whole distributions.

        Args:
          source: The Hugging Face folder.
          build: How the artifact was compiled, as `CompileConfig` has it, with `dtype`.

        Returns: `logprob_error`, the largest difference of a served log-probability of a prompt's token; `kld` and
          more of the rewritten step over all positions.
        """
        from benchmarks.peers.exactness import compare_with_forward  # noqa: PLC0415 - the compiler is no part of serving

        prompts = [make_prompt(self.vocab_size, tokens, 7000 + index) for index in range(texts)]
        served = [self._prompt_logprobs(prompt) for prompt in prompts]
        return compare_with_forward(Path(source), prompts, served, dict(build))

    def _prompt_logprobs(self, prompt: list[int]) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        (output,) = self._llm.generate(prompt_token_ids=[prompt], sampling_params=params, use_tqdm=False)
        pairs = zip(prompt[1:], (output.prompt_logprobs or [])[1:], strict=True)
        return [found[token_id].logprob for token_id, found in pairs if found is not None]


def seconds_a_step(times: list[list[float]]) -> float:
    """Time of a step while all requests run, from the moments of each one's tokens."""
    begin, end = max(row[1] for row in times), min(row[-1] for row in times)
    counts = [sum(begin < when <= end for when in row) for row in times]
    if not all(counts):
        raise RuntimeError(f"the requests never ran together; tokens each meanwhile: {counts}")
    return (end - begin) * len(times) / sum(counts)


def _sampled(count: int) -> SamplingParams:
    return SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, max_tokens=count, ignore_eos=True)
