"""CTranslate2: its generator, a callback a token telling when each came."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np

from benchmarks.peers.shapes import EOS
from benchmarks.peers.worker import TEMPERATURE, TOP_K


class Engine:
    """One generator."""

    def __init__(self, model: str, threads: int, vocab_size: int, compute_type: str = "int8"):
        self.vocab_size = vocab_size
        self._generator = ctranslate2.Generator(
            model, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
        )
        self._settings = {"threads": threads, "compute_type": self._generator.compute_type}
        # Prompts are tokens as text; the converter wrote them in the order of their ids.
        self._tokens = json.loads((Path(model) / "vocabulary.json").read_text())

    def about(self) -> dict[str, Any]:
        types = ", ".join(sorted(ctranslate2.get_supported_compute_types("cpu")))
        return {"version": ctranslate2.__version__, "build": f"wheel; types {types}", "settings": self._settings}

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        # The first row of a step is told first; the time between two of its tokens is that of a step.
        times = [when for when, row in self._generate(prompts, steps + 1) if row == 0]
        return (times[steps] - times[1]) / (steps - 1)

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        (when, _), *_ = self._generate([prompt], 1)
        return when - start

    def logits(self, prompt: list[int]) -> Any:
        view = self._generator.forward_batch([self._as_text(prompt)])
        return np.array(ctranslate2.StorageView.to_device(view, ctranslate2.Device.cpu))[0, -1]

    def _generate(self, prompts: list[list[int]], count: int) -> list[tuple[float, int]]:
        """Time and row of every token, in the order they came."""
        times: list[tuple[float, int]] = []
        self._generator.generate_batch(
            [self._as_text(prompt) for prompt in prompts],
            max_length=count,
            min_length=count,
            sampling_topk=TOP_K,
            sampling_temperature=TEMPERATURE,
            include_prompt_in_result=False,
            end_token=[EOS],
            callback=lambda result: bool(times.append((time.perf_counter(), result.batch_id))),
        )
        return times

    def _as_text(self, ids: list[int]) -> list[str]:
        return [self._tokens[i] for i in ids]
