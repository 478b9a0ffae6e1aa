"""How byte-level BPE tokenizers cut a text into words, by the name that GGUF files give the way.

Knows regular expressions, no vocabulary. The one idea: merges alone do not make a tokenizer; what they may not cross is
known per kind of model, and a kind is a row of this table. Sources: the `pre_tokenizer` entries of the models' own
tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fastgpt_jax.errors import UserError


@dataclass(frozen=True)
class ByteLevelKind:
    """How text becomes words.

    Each of `splits` cuts what the one before it left, at its matches and between them; `has_gpt2_words` cuts as GPT-2
    does after that. `normalizes` means to Unicode NFC. `ignores_merges`: a word that is a token is taken whole.
    `adds_bos` holds where a file does not say. `special_tokens` are those of a folder that lists none.
    """

    splits: tuple[str, ...] = ()
    has_gpt2_words: bool = False
    normalizes: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False
    special_tokens: tuple[str, ...] = ()


def find_kind(name: str, where: str) -> ByteLevelKind:
    """The kind of this name.

    Raises:
      UserError: There is none.
    """
    kind = KINDS.get(_ALIASES.get(name, name))
    if kind is None:
        raise UserError(
            f"{where} cuts words by the rules {name!r}, which are not supported; supported are "
            f"{', '.join(sorted(KINDS))}; take the model as a Hugging Face folder instead"
        )
    return kind


# Letters that have a case, as DeepSeek's first tokenizers list them: code points and ranges of them, hexadecimal.
_CASED_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c "
    "38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b "
    "1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 "
    "1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 "
    "2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b "
    "2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 "
    "fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df "
    "1e900-1e943"
)


def _character_class(ranges: str) -> str:
    escaped = ("-".join(rf"\x{{{point}}}" for point in part.split("-")) for part in ranges.split())
    return "".join(escaped)


def _words(digits: str) -> str:
    """The pattern Qwen2 and Llama 3 share; `digits` is how many of them stay together."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_CJK = r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"

KINDS: Mapping[str, ByteLevelKind] = MappingProxyType(
    {
        "gpt-2": ByteLevelKind(has_gpt2_words=True, special_tokens=("<|endoftext|>",)),
        "qwen2": ByteLevelKind(
            splits=(_words(r"\p{N}"),),
            normalizes=True,
            special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ),
        "llama-bpe": ByteLevelKind(splits=(_words(r"\p{N}{1,3}"),), ignores_merges=True, adds_bos=True),
        "smollm": ByteLevelKind(splits=(r"\p{N}",), has_gpt2_words=True),
        "deepseek-llm": ByteLevelKind(
            splits=(
                r"[\r\n]",
                rf"\s?[{_character_class(_CASED_LETTERS)}]+",
                r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
                r"\s+$",
                _CJK,
                r"\p{N}",
            ),
        ),
        "deepseek-coder": ByteLevelKind(splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
        "tekken": ByteLevelKind(
            splits=(
                rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            ignores_merges=True,
            adds_bos=True,
        ),
    }
)
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "llama3": "llama-bpe",
        "llama-v3": "llama-bpe",
        "deepseek-r1-qwen": "qwen2",
        "megrez": "qwen2",
        "starcoder": "smollm",
        "refact": "smollm",
        "command-r": "smollm",
        "phi-2": "gpt-2",
        "olmo": "gpt-2",
        "mpt": "gpt-2",
    }
)
