"""The settings of a training run: frozen dataclasses, and the one strict way from a mapping to them.

Knows no flags and no config library: a command hands over a plain mapping (`ml_collections.ConfigDict.to_dict()`).
The one idea: a key or a type that the dataclass does not have is the user's mistake and is named with its nearest
neighbour, so that a misspelt override never trains the wrong model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from fastgpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """Byte-level BPE: `vocab_size` counts the 256 bytes, the merges and the one special token."""

    vocab_size: int = 1024


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """How a text becomes batches.

    `valid_fraction` is cut from the end of the text. Paragraphs (separated by an empty line) are joined into documents
    of `paragraphs_per_document`; between two documents stands the end-of-text token, so that the model learns to end.
    """

    window_tokens: int = 256
    batch_size: int = 16
    valid_fraction: float = 0.1
    paragraphs_per_document: int = 16


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The Llama shape to train; the vocabulary is the tokenizer's."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101) under a linear warm-up and a cosine decay to `final_learning_rate_fraction`."""

    learning_rate: float = 3e-3
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """A whole run. `steps` is the length of the schedule; a resumed run continues up to it."""

    name: str = "model"
    seed: int = 0
    steps: int = 1000
    log_every_steps: int = 20
    evaluate_every_steps: int = 200
    checkpoint_every_steps: int = 500
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()

    def __post_init__(self):
        positive = {
            "steps": self.steps,
            "log_every_steps": self.log_every_steps,
            "evaluate_every_steps": self.evaluate_every_steps,
            "checkpoint_every_steps": self.checkpoint_every_steps,
            "data.window_tokens": self.data.window_tokens,
            "data.batch_size": self.data.batch_size,
            "data.paragraphs_per_document": self.data.paragraphs_per_document,
        }
        for key, value in positive.items():
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}")
        if not 0.0 < self.data.valid_fraction < 1.0:
            raise UserError(f"data.valid_fraction must lie between 0 and 1, got {self.data.valid_fraction}")
        if self.data.window_tokens > self.model.max_position_embeddings:
            raise UserError(
                f"data.window_tokens must be no more than model.max_position_embeddings, got "
                f"{self.data.window_tokens} and {self.model.max_position_embeddings}"
            )
        if not 0.0 < self.optimizer.learning_rate < math.inf:
            raise UserError(f"optimizer.learning_rate must be finite and above 0, got {self.optimizer.learning_rate}")
        if not 0 <= self.optimizer.warmup_steps < self.steps:
            raise UserError(
                f"optimizer.warmup_steps must be less than steps, got {self.optimizer.warmup_steps} and {self.steps}"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrainSettings:
        """Reads nested settings; an unknown key or a value of another type is a `UserError`."""
        return _from_mapping(cls, mapping, "")


def _from_mapping(cls: type, mapping: Mapping[str, Any], path: str) -> Any:
    types = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in mapping.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"unknown config key {path}{key}; {hint}")
        values[key] = _value(types[key], value, f"{path}{key}")
    return cls(**values)


def _value(expected: type, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise UserError(f"config key {path} must be a group of settings, got {value!r}")
        return _from_mapping(expected, value, f"{path}.")
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or isinstance(value, bool) is not (expected is bool):
        raise UserError(f"config key {path} must be of type {expected.__name__}, got {value!r}")
    return value
