"""Byte-level BPE tokenizers from vocab.json and merges.txt, for folders that have no tokenizer.json.

The one idea: the two files hold everything but how a text is cut into words before merging, and which tokens are
special; both are known per kind (`byte_level_kinds`).
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.tokenizer.byte_level_kinds import ByteLevelKind

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"


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
    tokenizer = assemble_byte_level(bpe, kind)
    _add_tokens(tokenizer, kind, config)
    return tokenizer


def assemble_byte_level(bpe: models.BPE, kind: ByteLevelKind) -> Tokenizer:
    """Puts the kind's normalizer and words before the merges, and bytes around them; no token is added."""
    tokenizer = Tokenizer(bpe)
    if kind.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in kind.splits
    ]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.has_gpt2_words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
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
