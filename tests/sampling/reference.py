"""The sampler's meaning in plain NumPy float64, one row at a time, with full sorts."""

from __future__ import annotations

import numpy as np

from fastgpt_jax.sampling.params import SamplingParams


def adjusted_logits(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], banned=()):
    """Bans, bias and penalties."""
    x = logits.astype(np.float64).copy()
    x[list(banned)] = -np.inf
    for token_id, value in params.logit_bias.items():
        x[token_id] += value
    for token_id in set(prompt) | set(output):
        x[token_id] = (
            x[token_id] / params.repetition_penalty if x[token_id] > 0 else x[token_id] * params.repetition_penalty
        )
    for token_id in set(output):
        x[token_id] -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def keep_prefix(order: np.ndarray, probs: np.ndarray, mass: float) -> np.ndarray:
    """The shortest prefix of `order` with this mass, as ids."""
    total = probs[order].sum()
    length = 1 + int(np.sum(np.cumsum(probs[order]) < mass * total))
    return order[: min(length, len(order))]


def distribution(logits: np.ndarray, params: SamplingParams, prompt=(), output=(), banned=()) -> np.ndarray:
    """The probabilities a token is drawn with."""
    x = adjusted_logits(logits, params, list(prompt), list(output), banned)
    if params.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x = x / params.temperature
    x = np.where(x >= x.max() + (np.log(params.min_p) if params.min_p > 0 else -np.inf), x, -np.inf)
    order = np.argsort(-x, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        order = keep_prefix(order, softmax(x), params.top_p)
    x = np.where(np.isin(np.arange(len(x)), order), x, -np.inf)
    if params.typical_p < 1:
        probs = softmax(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probs)
            entropy = np.nansum(probs * surprise)
        order = keep_prefix(np.argsort(np.abs(surprise - entropy), kind="stable"), probs, params.typical_p)
        x = np.where(np.isin(np.arange(len(x)), order), x, -np.inf)
    return softmax(x)
