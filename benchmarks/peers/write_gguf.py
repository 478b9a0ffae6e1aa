"""Writes a model folder as llama.cpp's GGUF: float16 by the `gguf` package, then llama.cpp's own quantization.

Needs the environment of the peers. The one idea: what llama.cpp's users would get for the same weights, so heads are
interleaved as its rotary embedding wants them for a Llama, and its own function chooses the formats of each tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from benchmarks.peers.shapes import BOS, EOS, Shape
from benchmarks.peers.write_model import vocabulary

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FORMATS = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}


def write_gguf(shape: Shape, source: Path, path: Path) -> None:
    """Writes the float16 file; vectors stay float32, as llama.cpp's converter has it."""
    writer = gguf.GGUFWriter(path, "qwen2" if shape.is_qwen2 else "llama")
    _add_fields(writer, shape)
    for name, tensor in _tensors(shape, source):
        writer.add_tensor(name, tensor.astype(np.float16) if tensor.ndim == 2 else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, path: Path, format_name: str) -> None:
    """Quantizes a file by llama.cpp's own function."""
    import llama_cpp  # noqa: PLC0415 - other engines' files can be made without it

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FORMATS[format_name], 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize to {format_name} ended with {code}")


def _add_fields(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(shape.name)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if shape.is_qwen2 else "default")
    tokens = vocabulary(shape.vocab_size)
    writer.add_token_list(tokens)
    control = gguf.TokenType.CONTROL
    writer.add_token_types([control if i < 3 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)


def _tensors(shape: Shape, source: Path) -> Iterator[tuple[str, np.ndarray]]:
    heads = {"self_attn.q_proj": shape.num_heads, "self_attn.k_proj": shape.num_kv_heads}
    with safe_open(source / "model.safetensors", "numpy") as file:
        for name in file.keys():
            stem, _, kind = name.rpartition(".")
            tensor = file.get_tensor(name)
            if stem in OUTER:
                yield f"{OUTER[stem]}.{kind}", tensor
                continue
            index, _, part = stem.removeprefix("model.layers.").partition(".")
            if part in heads and not shape.is_qwen2:
                tensor = interleave(tensor, heads[part])
            yield f"blk.{index}.{NAMES[part]}.{kind}", tensor


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Puts a head's row i beside its row i + half, where Hugging Face has the halves one after the other."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
