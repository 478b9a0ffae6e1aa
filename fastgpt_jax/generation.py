"""What a model folder says about generating from it; a leaf that checkpoint, compiler and engine all may import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationDefaults:
    """Facts about generation that a checkpoint carries beside its weights.

    `eos_token_ids` end a request (several for chat models); `max_model_len` is the longest sequence, prompt and output
    together, that the model was made for, in tokens.
    """

    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
