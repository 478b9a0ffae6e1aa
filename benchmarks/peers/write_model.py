"""Writes a model of a shape, weights random, as a Hugging Face folder: config, safetensors and a tokenizer.

Needs numpy, safetensors and tokenizers. The one idea: weights are drawn tensor by tensor from a fixed seed, so that
every engine's file is made from the same numbers, on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.peers.shapes import BOS, EOS, Shape

STANDARD_DEVIATION = 0.02
SPECIAL = ("<unk>", "<s>", "</s>")
PADDING = "<|endoftext|>"
"""Loading Qwen2's tokenizer adds this one where it is missing, and then there is an id too many."""


def write_model(shape: Shape, folder: Path) -> None:
    """Writes all files of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", shape.config())
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_tokenizer(shape, folder)
    save_file(dict(draw_tensors(shape)), folder / "model.safetensors", metadata={"format": "pt"})


def draw_tensors(shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor with its name: matrices around 0, norms around 1, biases where the family has them."""
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32) * np.float32(STANDARD_DEVIATION)

    yield "model.embed_tokens.weight", normal(shape.vocab_size, shape.hidden_size)
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}"
        for name, sizes in shape.matrix_shapes.items():
            yield f"{layer}.{name}.weight", normal(*sizes)
            if shape.is_qwen2 and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                yield f"{layer}.{name}.bias", normal(sizes[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", 1 + normal(shape.hidden_size)
    yield "model.norm.weight", 1 + normal(shape.hidden_size)
    if not shape.is_qwen2:
        yield "lm_head.weight", normal(shape.vocab_size, shape.hidden_size)


def vocabulary(size: int) -> list[str]:
    """Tokens by id: three special ones, the 256 bytes in GPT-2's spelling, one merged pair, and words to fill up."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, "ab"]
    return [*tokens, *(f"word{index}" for index in range(size - len(tokens) - 1)), PADDING]


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """A tokenizer of bytes with the model's number of ids; engines that want one at load get it, none measures it."""
    tokens = vocabulary(shape.vocab_size)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, PADDING])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "unk_token": SPECIAL[0],
        "add_bos_token": False,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
