"""The file that `--quality_text` names: plain text, whose beginning is cut into windows for a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.quality import Windows, cut_windows
from fastgpt_jax.errors import UserError

WINDOW_TOKENS = 256
_CHARACTERS_A_TOKEN = 16
"""More than tokens of ordinary text have, so that a large file need not be encoded to its end."""


@dataclasses.dataclass(frozen=True)
class QualityText:
    """The beginning of a text.

    Attributes:
      name: Of the file.
      first_id: What the tokenizer puts before a text; each window begins with it.
    """

    name: str
    ids: tuple[int, ...]
    first_id: int | None

    def windows(self, compiled: Compiled) -> Windows:
        """Windows no longer than the model takes; what is shorter than its first chunk is left out.

        Raises:
          UserError: There is no window.
        """
        least = max(2, compiled.min_first_chunk)
        cut = cut_windows(self.ids, min(max(WINDOW_TOKENS, least), compiled.max_model_len), self.first_id)
        is_long = cut.counts >= least
        if not is_long.any():
            raise UserError(f"--quality_text {self.name} must hold at least {least} tokens, got {len(self.ids)}")
        return Windows(cut.tokens[is_long], cut.counts[is_long])


def read_quality_text(path: str, num_tokens: int, tokenizer: Any) -> QualityText:
    """Reads the first tokens of a file.

    Raises:
      UserError: The file cannot be read, or the model has no tokenizer.
    """
    if tokenizer is None:
        raise UserError("--quality_text needs a tokenizer, and the model has none; name one with --tokenizer")
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(num_tokens * _CHARACTERS_A_TOKEN)
    except OSError as error:
        raise UserError(f"--quality_text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--quality_text {path} is no UTF-8 text: {error.reason} at byte {error.start}") from error
    ids, bos = tokenizer.encode(text), tokenizer.bos_token_id
    first_id = bos if bos is not None and ids[:1] == [bos] else None
    ids = ids[first_id is not None :][:num_tokens]
    if len(ids) < 2:
        raise UserError(f"--quality_text {path} must hold at least 2 tokens, got {len(ids)}")
    return QualityText(Path(path).name, tuple(ids), first_id)
