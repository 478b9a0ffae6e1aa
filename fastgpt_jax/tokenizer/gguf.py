"""A tokenizer from the metadata of a GGUF file.

Knows the `tokenizer.ggml.*` fields, not the file. The one idea: the fields hold what a tokenizer.json would, in another
spelling: `gpt2` is a byte-level BPE whose way of cutting words is named by `pre`; `llama` is a SentencePiece BPE, whose
merges are not listed but follow from the scores of its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields
from fastgpt_jax.tokenizer.byte_level import assemble_byte_level
from fastgpt_jax.tokenizer.byte_level_kinds import find_kind
from fastgpt_jax.tokenizer.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_SPACE = "▁"


def make_gguf_tokenizer(metadata: Fields) -> Tokenizer | None:
    """Builds the tokenizer; None where the metadata hold no vocabulary.

    Raises:
      UserError: The model, or its way of cutting words, is none that is supported, or a field is missing or wrong.
    """
    if metadata.values.get("tokenizer.ggml.tokens") is None:
        return None
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    model = metadata.string("tokenizer.ggml.model")
    if model == "gpt2":
        # Files from before the field was invented hold GPT-2's and Llama 3's alike, so that guessing would be wrong.
        kind = find_kind(metadata.string("tokenizer.ggml.pre"), metadata.where)
        merges = [_split_merge(merge, metadata) for merge in _list(metadata, "tokenizer.ggml.merges", str)]
        bpe = _make(metadata, _vocabulary(tokens), merges, ignore_merges=kind.ignores_merges)
        backend, adds_bos = assemble_byte_level(bpe, kind), kind.adds_bos
    elif model == "llama":
        backend, adds_bos = _make_sentencepiece(tokens, metadata), True
    else:
        raise UserError(
            f"{metadata.where} has a tokenizer of the model {model!r}, which is not supported; supported are 'gpt2' "
            "and 'llama'; take the model as a Hugging Face folder instead"
        )
    _add_tokens(backend, tokens, metadata)
    eos_token_ids = metadata.token_ids("tokenizer.ggml.eos_token_id")
    # A chat model ends its turn with a token of its own, where that is not its EOS token already.
    eos_token_ids += metadata.token_ids("tokenizer.ggml.eot_token_id")
    bos_token_ids = metadata.token_ids("tokenizer.ggml.bos_token_id")
    _check_ids(eos_token_ids + bos_token_ids, len(tokens), metadata)
    return Tokenizer(
        backend,
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        add_bos=metadata.boolean("tokenizer.ggml.add_bos_token", adds_bos),
    )


def _make_sentencepiece(tokens: list[str], metadata: Fields) -> tokenizers.Tokenizer:
    """Spaces are `▁`, what is not in the vocabulary is spelt in bytes, and a text begins with a space."""
    unknown = metadata.token_ids("tokenizer.ggml.unknown_token_id") or (0,)
    _check_ids(unknown, len(tokens), metadata)
    scores = _list(metadata, "tokenizer.ggml.scores", int | float)
    if len(scores) != len(tokens):
        raise UserError(f"{metadata.where} has {len(tokens)} tokens and {len(scores)} scores; it is damaged")
    vocabulary = _vocabulary(tokens)
    options: dict[str, Any] = {"unk_token": tokens[unknown[0]], "fuse_unk": True, "byte_fallback": True}
    backend = tokenizers.Tokenizer(_make(metadata, vocabulary, _merges_of_scores(vocabulary, scores), **options))
    has_prefix = metadata.boolean("tokenizer.ggml.add_space_prefix", True)
    to_pieces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    to_text: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        to_pieces.insert(0, normalizers.Prepend(_SPACE))
        to_text.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(to_pieces)
    backend.decoder = decoders.Sequence(to_text)
    return backend


def _merges_of_scores(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first.

    SentencePiece joins the neighbours whose piece scores best; a list of merges joins those that come first in it.
    """
    merges = []
    for piece, token_id in vocabulary.items():
        ways = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [(left, right) for left, right in ways if left in vocabulary and right in vocabulary]
        known.sort(key=lambda way: (vocabulary[way[0]], vocabulary[way[1]]))
        merges += [(scores[token_id], way) for way in known]
    merges.sort(key=lambda merge: -merge[0])  # stable: the order above stands where scores are equal
    return [way for _, way in merges]


def _make(metadata: Fields, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"{metadata.where} does not hold a BPE tokenizer: {error}") from error


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], metadata: Fields) -> None:
    """Control tokens steer the model and have no text; user-defined ones are text that is never cut."""
    types = metadata.values.get("tokenizer.ggml.token_type") or []
    by_type = list(zip(tokens, types, strict=False))
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in by_type if kind == _USER_DEFINED])
    backend.add_special_tokens([AddedToken(token, special=True) for token, kind in by_type if kind == _CONTROL])


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(tokens)}


def _split_merge(merge: str, metadata: Fields) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise UserError(f"{metadata.where} has the merge {merge!r}, which must be two tokens and a space between them")
    return left, right


def _check_ids(token_ids: tuple[int, ...], num_tokens: int, metadata: Fields) -> None:
    for token_id in token_ids:
        if token_id >= num_tokens:
            raise UserError(f"{metadata.where} names the special token {token_id}, but has {num_tokens} tokens alone")


def _list(metadata: Fields, name: str, kind: Any) -> list[Any]:
    values = metadata.values.get(name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{metadata.where} must give {name} as an array; it is missing or of another type")
    return values
