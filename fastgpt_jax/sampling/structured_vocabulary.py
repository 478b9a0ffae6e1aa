"""The bytes that each token of a tokenizer adds to a text: what a grammar must know of a vocabulary.

Knows no grammar. The one idea: the decoder of the tokenizer's own description says how tokens are spelled (bytes as
letters, or pieces with a mark for the space and tokens for single bytes), so no token is decoded to find out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastgpt_jax.errors import UserError

_SPACE = "▁"


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Returns the bytes of every id below `vocab_size`; empty for special tokens and for ids that have no token.

    Raises:
      UserError: The model has no tokenizer, or one that spells its tokens in another way.
    """
    if tokenizer is None:
        raise UserError("the model has no tokenizer, so structured_outputs has no meaning")
    if not hasattr(tokenizer, "describe"):
        return _of_plain_tokenizer(tokenizer, vocab_size)
    description = json.loads(tokenizer.describe())
    kinds = {decoder["type"] for decoder in _decoders(description.get("decoder"))}
    added = {token["id"]: token for token in description.get("added_tokens", ())}
    if "ByteLevel" in kinds:
        letters = _byte_of_letter()

        def spell(token: str) -> bytes:
            if not all(letter in letters for letter in token):
                return token.encode()
            return b"".join(letters[letter] for letter in token)

    elif kinds & {"ByteFallback", "Metaspace"}:

        def spell(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace(_SPACE, " ").encode()

    else:
        raise UserError(
            f"structured_outputs needs a tokenizer of bytes or of pieces with bytes, and this one decodes by "
            f"{', '.join(sorted(kinds)) or 'nothing'}"
        )
    result = []
    for token_id in range(vocab_size):
        token = tokenizer.token(token_id)
        if token is None or token_id in tokenizer.special_token_ids:
            result.append(b"")
        elif token_id in added:
            result.append(token.encode())
        else:
            result.append(spell(token))
    return result


def _of_plain_tokenizer(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Asks a tokenizer of a user's own, which knows `decode(ids)` alone, token by token."""
    result = []
    for token_id in range(vocab_size):
        try:
            text = tokenizer.decode([token_id])
        except (IndexError, KeyError, ValueError):
            text = ""
        result.append(b"" if "\ufffd" in text else text.encode())
    return result


def _decoders(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _decoders(inner)
    else:
        yield decoder


def _byte_of_letter() -> dict[str, bytes]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}
