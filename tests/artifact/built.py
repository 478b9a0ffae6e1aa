"""A small artifact, built once a test run and copied for tests that change it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from fastgpt_jax.artifact.codec import encode
from fastgpt_jax.artifact.manifest import Manifest, write_manifest
from fastgpt_jax.compiler.build import BuildReport, build_artifact
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.models import Llama, LlamaConfig
from fastgpt_jax.sampling.params import SamplingParams
from tests.filled_model import make_filled_model

CONFIG = CompileConfig(
    max_model_len=24,
    max_num_seqs=2,
    page_size=5,
    max_num_batched_tokens=8,
    prefill_buckets=(8,),
    decode_buckets=(2,),
    max_logprobs=5,
)
LLAMA = LlamaConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
GREEDY = SamplingParams(temperature=0, max_tokens=8)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=8)
SCORED = SamplingParams(temperature=0, max_tokens=2, logprobs=2, prompt_logprobs=3)


def make_compiled() -> Compiled:
    return compile_model(make_filled_model(Llama, LLAMA), config=CONFIG)


def build(folder: Path, compiled: Compiled | None = None) -> BuildReport:
    return build_artifact(compiled or make_compiled(), folder, name="small")


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def rewrite(folder: Path, manifest: Manifest) -> None:
    """Another manifest with a digest that holds."""
    write_manifest(folder, manifest)


def with_environment(manifest: Manifest, **fields) -> Manifest:
    return dataclasses.replace(manifest, environment=dataclasses.replace(manifest.environment, **fields))


def manifest_values(manifest: Manifest) -> dict:
    return json.loads(json.dumps(encode(manifest)))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << int(np.random.RandomState(position % len(data)).randint(8))
    path.write_bytes(bytes(data))
