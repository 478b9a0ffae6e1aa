"""Text to batches of token windows.

Knows no model and no device: everything here is NumPy. The one idea: a batch is a function of (seed, step) alone, so a
resumed run sees exactly the batches that the uninterrupted run would have seen, and no iterator state is saved.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from fastgpt_jax.errors import UserError

_EMPTY_LINE = re.compile(r"\n[ \t]*\n+")


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file; a missing, empty or undecodable one is a `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such text file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the text must be UTF-8, but {path} is not at byte {error.start}; convert it first") from None
    if not text.strip():
        raise UserError(f"the text file is empty: {path}")
    return text


def split_text(text: str, valid_fraction: float) -> tuple[str, str]:
    """Cuts the last `valid_fraction` of the characters off as validation text."""
    cut = int(len(text) * (1.0 - valid_fraction))
    return text[:cut], text[cut:]


def documents(text: str, paragraphs_per_document: int) -> list[str]:
    """Joins consecutive paragraphs into documents, each ending with the empty line that ended its last paragraph."""
    paragraphs = [paragraph for paragraph in _EMPTY_LINE.split(text) if paragraph.strip()]
    groups = (paragraphs[i : i + paragraphs_per_document] for i in range(0, len(paragraphs), paragraphs_per_document))
    return ["\n\n".join(group) + "\n\n" for group in groups]


def encode_documents(tokenizer: Tokenizer, texts: list[str], separator_id: int) -> Int32[np.ndarray, " S"]:
    """Encodes documents into one stream, `separator_id` before each document and after the last."""
    ids = [separator_id]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(separator_id)
    return np.asarray(ids, np.int32)


def random_windows(
    stream: Int32[np.ndarray, " S"], batch_size: int, window_tokens: int, *, seed: int, step: int
) -> Int32[np.ndarray, "B W"]:
    """Draws the batch of one step: windows at random offsets, one token longer than the model reads (the last target).

    Raises:
      UserError: The stream is shorter than a window.
    """
    _require_window(stream, window_tokens)
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(stream) - window_tokens, size=batch_size)
    return stream[starts[:, None] + np.arange(window_tokens + 1)]


def all_windows(stream: Int32[np.ndarray, " S"], window_tokens: int) -> Int32[np.ndarray, "B W"]:
    """Cuts the stream into neighbouring windows that each predict `window_tokens` tokens; the rest is dropped."""
    _require_window(stream, window_tokens)
    starts = np.arange(0, len(stream) - window_tokens, window_tokens)
    return stream[starts[:, None] + np.arange(window_tokens + 1)]


def _require_window(stream: Int32[np.ndarray, " S"], window_tokens: int) -> None:
    if len(stream) < window_tokens + 1:
        raise UserError(
            f"each part of the text must hold at least data.window_tokens + 1 = {window_tokens + 1} tokens, got "
            f"{len(stream)}; use a longer text or a shorter window"
        )
