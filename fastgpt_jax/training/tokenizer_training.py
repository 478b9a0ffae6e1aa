"""Trains a byte-level BPE tokenizer and writes it in the Hugging Face layout.

Knows no model. The one idea: with all 256 bytes in the alphabet any text encodes and decodes to itself, so there is no
unknown token; the single special token `<|endoftext|>` begins, separates and ends documents, as GPT-2's does.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastgpt_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # the trainer numbers special tokens first
_NUM_BYTES = 256

# A chat is set as a play: the speaker in capitals, a colon, the speech, an empty line.
PLAY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}:\n{{ message['content'] | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """Learns byte-level BPE merges (GPT-2's) from `text`.

    Args:
      text: What the merges are counted on.
      vocab_size: Tokens in all: `<|endoftext|>` (id 0), 256 bytes, the rest merges.

    Returns: The tokenizer. A short text may hold fewer merges than asked for; the tokenizer is then smaller.

    Raises:
      UserError: `vocab_size` leaves no room for the bytes and the special token.
    """
    if vocab_size < _NUM_BYTES + 1:
        raise UserError(
            f"tokenizer.vocab_size must be at least {_NUM_BYTES + 1} (bytes and one special token), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer=trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_model_len: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` (special token, chat template) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_model_len,
        "chat_template": PLAY_CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
