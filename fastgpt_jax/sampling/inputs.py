"""The one struct that tells a compiled step how to sample, fixed from the start so that entry points never multiply.

Knows nothing of requests, engines or models: a leaf that the artifact, the engine and the compiler may all import.
The one idea: every feature of sampling (truncation, penalties, bias, structured output) is a row of numbers whose
neutral value changes nothing, so that one executable serves every mixture of requests.
"""

from __future__ import annotations

import dataclasses
from typing import no_type_check

import jax
import numpy as np
from jax import Array
from jaxtyping import Float32, Int32, UInt32

MAX_LOGIT_BIAS = 300
"""Entries of `logit_bias` a request may carry; OpenAI's own limit."""


@no_type_check  # tree utilities rebuild it around shapes, specs and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerInputs:
    """How to sample one token for each of R rows; S is the longest history, V the vocabulary.

    Invariants: a row of `init_sampler_inputs` is neutral (greedy, nothing banned, no history) and is what idle rows
    hold; no row's result depends on another row; ids outside the vocabulary are ignored.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: Keep the k most likely tokens; 0 keeps all.
      top_p: Keep the smallest set of most likely tokens with at least this mass; 1 keeps all.
      min_p: Drop tokens less likely than this times the most likely; 0 keeps all.
      typical_p: Keep the tokens whose surprise is nearest the entropy, up to this mass (arXiv:2202.00666); 1 keeps all.
      presence_penalty: Subtracted once from the logit of every token generated so far.
      frequency_penalty: Subtracted once per occurrence among the generated tokens.
      repetition_penalty: Divides positive and multiplies negative logits of prompt and generated tokens
        (arXiv:1909.05858); 1 changes nothing.
      history: Token ids, the prompt and then what was generated; read below `num_total`.
      num_prompt: Tokens of `history` that belong to the prompt.
      num_total: Valid tokens of `history`; `num_total - num_prompt` is the step that the random numbers are drawn for.
      bias_ids: Tokens whose logits `bias_values` are added to; padding is id 0 with value 0.
      bias_values: See `bias_ids`.
      allowed_bits: Bit `id % 32` of word `id // 32` says whether the token may be sampled.
      seeds: Seed of the request.
    """

    temperature: Float32[Array | np.ndarray, " R"]
    top_k: Int32[Array | np.ndarray, " R"]
    top_p: Float32[Array | np.ndarray, " R"]
    min_p: Float32[Array | np.ndarray, " R"]
    typical_p: Float32[Array | np.ndarray, " R"]
    presence_penalty: Float32[Array | np.ndarray, " R"]
    frequency_penalty: Float32[Array | np.ndarray, " R"]
    repetition_penalty: Float32[Array | np.ndarray, " R"]
    history: Int32[Array | np.ndarray, "R S"]
    num_prompt: Int32[Array | np.ndarray, " R"]
    num_total: Int32[Array | np.ndarray, " R"]
    bias_ids: Int32[Array | np.ndarray, "R N"]
    bias_values: Float32[Array | np.ndarray, "R N"]
    allowed_bits: UInt32[Array | np.ndarray, "R W"]
    seeds: UInt32[Array | np.ndarray, " R"]


def init_sampler_inputs(num_rows: int, vocab_size: int, max_history: int) -> SamplerInputs:
    """Returns neutral NumPy rows: greedy, nothing banned, no history. Also the shapes an entry point is lowered for."""

    def full(value: float) -> np.ndarray:
        return np.full((num_rows,), value, np.float32)

    return SamplerInputs(
        temperature=full(0.0),
        top_k=np.zeros((num_rows,), np.int32),
        top_p=full(1.0),
        min_p=full(0.0),
        typical_p=full(1.0),
        presence_penalty=full(0.0),
        frequency_penalty=full(0.0),
        repetition_penalty=full(1.0),
        history=np.zeros((num_rows, max_history), np.int32),
        num_prompt=np.zeros((num_rows,), np.int32),
        num_total=np.zeros((num_rows,), np.int32),
        bias_ids=np.zeros((num_rows, MAX_LOGIT_BIAS), np.int32),
        bias_values=np.zeros((num_rows, MAX_LOGIT_BIAS), np.float32),
        allowed_bits=np.full((num_rows, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
        seeds=np.zeros((num_rows,), np.uint32),
    )
