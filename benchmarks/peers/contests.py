"""Who is compared with whom, on what: engines with weights of one width, the settings tried of each, and the measures.

Knows no process. The one idea: a contest is a width of weights, since that alone decides what a decode step can reach;
within it every engine has the same threads, room in its cache, sampler and prompts, and is free in all else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.shapes import Shape

OURS = "fastgpt"
MAX_LEN, CACHE_TOKENS, MAX_SEQS = 2560, 4096, 32
PROMPT, STEPS, QUICK_STEPS = 16, {1: 32, 8: 24, 32: 12}, {1: 8, 8: 8, 32: 8}
"""Tokens before a decode, and its steps by its number of prompts."""


@dataclasses.dataclass(frozen=True)
class Build:
    """How an artifact of ours is compiled; None of `quantization` leaves weights as they are."""

    dtype: str
    quantization: str | None = None

    @property
    def name(self) -> str:
        return f"fastgpt-{self.dtype}" + (f"-{self.quantization}" if self.quantization else "")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An engine in a contest.

    Attributes:
      label: As tables call it, with its format of weights.
      file: Its model, in the shape's folder.
      variants: Settings tried; the fastest counts, measure by measure.
      build: Of ours, how `file` is made.
    """

    label: str
    engine: str
    file: str
    variants: tuple[Mapping[str, Any], ...]
    build: Build | None = None


@dataclasses.dataclass(frozen=True)
class Contest:
    """Engines whose weights have one width.

    Attributes:
      bits: A weight and its share of scales, as the limit counts them.
      numbers: What products are made of where tokens are many.
    """

    name: str
    bits: float
    numbers: str
    contestants: tuple[Contestant, ...]

    def step_bytes(self, shape: Shape) -> float:
        """Bytes of weights that a decode step cannot do without."""
        return shape.num_read * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Measure:
    """One thing that is timed: `decode` of a batch, `bare_decode` of ours, or `prefill` of a prompt.

    Attributes:
      size: Prompts of a decode, tokens of a prefill.
      tried: The measure whose fastest setting serves this one too.
    """

    kind: str
    size: int
    tried: int

    @property
    def name(self) -> str:
        return f"{self.kind.replace('_', ' ')} {self.size}"

    def arguments(self, seed: int, steps: int) -> dict[str, Any]:
        """What a worker is asked; a prefill has no steps."""
        if self.kind == "prefill":
            return {"tokens": self.size, "seed": seed}
        return {"batch": self.size, "prompt": PROMPT, "steps": steps, "seed": seed}

    def tokens_a_second(self, seconds: float) -> float:
        return self.size / seconds


MEASURES = (
    Measure("decode", 1, 1),
    Measure("decode", 8, 8),
    Measure("decode", 32, 8),
    Measure("bare_decode", 1, 1),
    Measure("bare_decode", 8, 8),
    Measure("bare_decode", 32, 8),
    Measure("prefill", 128, 512),
    Measure("prefill", 512, 512),
    Measure("prefill", 2048, 512),
)
QUICK_MEASURES = tuple(m for m in MEASURES if m.size <= (128 if m.kind == "prefill" else 8))

LLAMA_CPP = (
    {"flash_attention": True},
    {"flash_attention": False},
    {"flash_attention": True, "use_repack": False},
    {"flash_attention": True, "kv_unified": False},
)
OPENVINO = (
    {"attention": "PA"},
    {"attention": "SDPA"},
    {"attention": "PA", "properties": {"INFERENCE_PRECISION_HINT": "bf16"}},
    {"attention": "PA", "properties": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}},
)
CTRANSLATE2 = (
    {"compute_type": "int8_float32"},
    {"compute_type": "int8_float32", "env": {"CT2_USE_MKL": "1"}},
    {"compute_type": "int8_float32", "env": {"CT2_USE_EXPERIMENTAL_PACKED_GEMM": "1", "CT2_USE_MKL": "1"}},
)


def _ours(build: Build, label: str) -> Contestant:
    return Contestant(f"{OURS} {label}", OURS, build.name, ({},), build)


def _torch(dtype: str, file: str) -> Contestant:
    variants = ({"dtype": dtype}, {"dtype": dtype, "is_compiled": True})
    return Contestant(f"torch {dtype}", "torch", file, variants)


CONTESTS = {
    contest.name: contest
    for contest in (
        Contest(
            "int8",
            8,
            "int8",
            (
                _ours(Build("float32", "w8a8"), "int8"),
                Contestant("llama.cpp q8_0", "llama.cpp", "q8_0.gguf", LLAMA_CPP),
                Contestant("openvino int8", "openvino", "openvino-int8", OPENVINO),
                Contestant("ctranslate2 int8", "ctranslate2", "ctranslate2-int8", CTRANSLATE2),
            ),
        ),
        Contest(
            "int4",
            4.5,
            "int8",
            (
                _ours(Build("float32", "w4a8"), "int4"),
                Contestant("llama.cpp q4_0", "llama.cpp", "q4_0.gguf", LLAMA_CPP),
                Contestant("openvino int4", "openvino", "openvino-int4", OPENVINO),
            ),
        ),
        Contest("bfloat16", 16, "bfloat16", (_ours(Build("bfloat16"), "bfloat16"), _torch("bfloat16", "torch-bf16"))),
        Contest("float32", 32, "float32", (_ours(Build("float32"), "float32"), _torch("float32", "hf"))),
    )
}


def settings(contestant: Contestant, variant: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """What its worker is made with, but for the model's path."""
    room = {"max_len": MAX_LEN, "cache_tokens": CACHE_TOKENS, "max_seqs": MAX_SEQS}
    shared: dict[str, dict[str, Any]] = {
        "fastgpt": {},
        "llama.cpp": room,
        "openvino": room,
        "ctranslate2": {"vocab_size": shape.vocab_size},
        "torch": {"max_len": MAX_LEN},
    }
    return {**shared[contestant.engine], **variant}
