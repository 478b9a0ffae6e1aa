"""The forms a prompt may come in, and what the model asks of it; every mistake is one line.

Knows no engine. The one idea: a prompt becomes token ids, and is checked, before anything is queued for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastgpt_jax.engine.compiled import CompiledModel
from fastgpt_jax.engine.pooling import PoolingParams
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams

Prompt = str | Mapping[str, Any] | Sequence[int] | np.ndarray
"""Text, token ids, or vLLM's `{"prompt": text}` and `{"prompt_token_ids": ids}`."""


def as_prompts(prompts: Any, prompt_token_ids: Any = None) -> list[Prompt]:
    """Returns a list of prompts from one or many, given as text, mappings or ids."""
    if (prompts is None) == (prompt_token_ids is None):
        raise UserError("give either prompts or prompt_token_ids")
    given = prompts if prompts is not None else prompt_token_ids
    if isinstance(given, (str, Mapping)) or _is_ids(given):
        return [given]
    if not isinstance(given, (Sequence, np.ndarray)):
        raise UserError(f"prompts must be text, token ids or a list of these, got {type(given).__name__}")
    return list(given)


def encode_prompt(prompt: Any, tokenizer: Any) -> tuple[str | None, list[int]]:
    """Returns a prompt's text, where there is any, and its token ids."""
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), _to_ids(prompt["prompt_token_ids"])
        if "prompt" not in prompt:
            raise UserError(f"a prompt mapping needs 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        return None, _to_ids(prompt)
    if not prompt:
        raise UserError("the prompt is empty; give some text, or the token ids to begin with")
    if tokenizer is None:
        raise UserError("the model has no tokenizer, so it takes token ids alone: give prompt_token_ids (--prompt_ids)")
    encoded = tokenizer.encode(prompt)
    return prompt, _to_ids(getattr(encoded, "ids", encoded))


def check_prompt(token_ids: Sequence[int], compiled: CompiledModel) -> None:
    """Raises UserError where the model cannot continue this prompt."""
    if not token_ids:
        raise UserError("the prompt is empty; give at least one token")
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < compiled.vocab_size), None)
    if wrong is not None:
        raise UserError(f"token id {wrong} is outside the vocabulary of {compiled.vocab_size} tokens")
    if len(token_ids) >= compiled.max_model_len:
        raise UserError(
            f"the prompt has {len(token_ids)} tokens and the context holds {compiled.max_model_len}, one of which must "
            "be left for the answer; shorten the prompt or raise max_model_len"
        )
    if len(token_ids) < compiled.min_first_chunk:
        raise UserError(
            f"the prompt has {len(token_ids)} tokens and this model sees its first {compiled.min_first_chunk} tokens "
            f"at once; give at least {compiled.min_first_chunk}"
        )


def check_params(params: SamplingParams | PoolingParams, compiled: CompiledModel) -> None:
    """Raises UserError where the parameters ask for what this model does not have."""
    if isinstance(params, PoolingParams):
        if not compiled.hidden_size:
            raise UserError("this model has no embeddings: what its vocabulary projection reads cannot be told apart")
        return
    if not isinstance(params, SamplingParams):
        raise UserError(f"sampling parameters must be SamplingParams, got {type(params).__name__}")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value > compiled.max_logprobs:
            raise UserError(
                f"{name} may be at most {compiled.max_logprobs}, got {value}; compile with a larger max_logprobs"
            )
    if params.stop and compiled.tokenizer is None:
        raise UserError("the model has no tokenizer, so stop strings have no meaning: use stop_token_ids")
    for name in ("stop_token_ids", "logit_bias"):
        wrong = next((token_id for token_id in getattr(params, name) if token_id >= compiled.vocab_size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} of {name} is outside the vocabulary of {compiled.vocab_size} tokens")


def _is_ids(value: Any) -> bool:
    """Whether this is one prompt of token ids, rather than a list of prompts."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype != object
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(item, (int, np.integer)) for item in value)


def _to_ids(values: Any) -> list[int]:
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, (str, bytes)):
        raise UserError(f"a prompt must be text or a list of token ids, got {type(values).__name__}")
    for value in values:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise UserError(f"token ids must be integers, got {value!r}")
    return [int(value) for value in values]
