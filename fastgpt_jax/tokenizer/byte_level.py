"""Byte-level BPE tokenizers from vocab.json and merges.txt, for folders that have no tokenizer.json.

The one idea: the two files hold everything but how a text is cut into words before merging, and which tokens are
special; both are known per kind. Sources: the GPT-2 and Qwen2 tokenizers of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"


@dataclass(frozen=True)
class ByteLevelKind:
    """`word_pattern` is the regular expression of a word, None for GPT-2's; `normalizes` means to Unicode NFC."""

    word_pattern: str | None
    normalizes: bool
    special_tokens: tuple[str, ...]


KINDS: Mapping[str, ByteLevelKind] = MappingProxyType(
    {
        "gpt2": ByteLevelKind(word_pattern=None, normalizes=False, special_tokens=("<|endoftext|>",)),
        "qwen2": ByteLevelKind(
            word_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            normalizes=True,
            special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ),
    }
)


def make_byte_level_tokenizer(folder: Path, kind: ByteLevelKind, config: Fields) -> Tokenizer:
    """Builds the tokenizer.

    Args:
      config: tokenizer_config.json; its `added_tokens_decoder`, where given, replaces the kind's special tokens.

    Raises:
      UserError: A file cannot be read, or an added token would get another id than the one it is listed with.
    """
    try:
        bpe = models.BPE.from_file(str(folder / VOCAB_FILE), str(folder / MERGES_FILE))
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"cannot read {folder / VOCAB_FILE} and {MERGES_FILE} as a BPE tokenizer: {error}") from error
    tokenizer = Tokenizer(bpe)
    if kind.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    if kind.word_pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = pre_tokenizers.Split(Regex(kind.word_pattern), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, kind, config)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, kind: ByteLevelKind, config: Fields) -> None:
    listed = config.object("added_tokens_decoder").values
    if not listed:
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in kind.special_tokens])
        return
    try:
        tokens = sorted((int(token_id), dict(token)) for token_id, token in listed.items())
    except (ValueError, TypeError) as error:
        raise UserError(f"added_tokens_decoder of {config.where} must map token ids to tokens ({error})") from error
    for token_id, fields in tokens:
        entry = Fields(fields, f"added token {token_id} of {config.where}")
        content, is_special = entry.string("content"), entry.boolean("special", False)
        flags = {name: entry.boolean(name, False) for name in ("single_word", "lstrip", "rstrip")}
        added = AddedToken(content, special=is_special, normalized=entry.boolean("normalized", not is_special), **flags)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(content) != token_id:
            raise UserError(
                f"{config.where} lists {content!r} as token {token_id}, but after {VOCAB_FILE} it would be "
                f"{tokenizer.token_to_id(content)}; the two files do not belong together"
            )
