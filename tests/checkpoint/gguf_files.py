"""Writes a model folder as GGUF with the `gguf` package, following llama.cpp's conventions, with no code under test."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
GGML = gguf.GGMLQuantizationType

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], np.float32).reshape(entry["shape"])
    return tensors


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Row `j H/2 + i` of every head goes to row `2 i + j`, one by one."""
    head_dim = len(rows) // num_heads
    out = np.empty_like(rows)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            for j in range(2):
                out[head * head_dim + 2 * i + j] = rows[head * head_dim + j * (head_dim // 2) + i]
    return out


def own_name(name: str) -> str:
    name = name.removeprefix("model.")
    shared = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    shared["lm_head.weight"] = "output.weight"
    if name in shared:
        return shared[name]
    _, layer, rest = name.split(".", 2)
    middle, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[middle]}.{kind}"


def write_gguf(
    folder: Path, path: Path, kind=GGML.F32, *, endianess=None, change=None, tensors=None, **writing
) -> Path:
    """Args:
    kind: The type of all matrices whose rows it divides, F16 for the others; vectors are F32.
    change: Called with the writer once all metadata are in it.
    tensors: Further tensors, by GGUF's names.
    writing: Further arguments of the writer.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    endian = endianess if endianess is not None else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, arch, endianess=endian, **writing)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if (folder / "tokenizer.json").exists():
        add_sentencepiece(writer, json.loads((folder / "tokenizer.json").read_text()))
    if change is not None:
        change(writer)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, values in read_safetensors(folder / "model.safetensors").items():
        if arch == "llama" and name.split(".")[-2] in heads:
            values = interleave(values, heads[name.split(".")[-2]])
        add_tensor(writer, own_name(name), values, kind)
    for name, values in (tensors or {}).items():
        add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer, name, values, kind):
    if values.ndim < 2 or kind == GGML.F32:
        writer.add_tensor(name, values)
        return
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    kind = GGML.F16 if values.shape[-1] % block else kind
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def add_sentencepiece(writer, tokenizer):
    """Scores follow the order of the merges, as SentencePiece's do."""
    vocab = tokenizer["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.get)
    rank = {}
    for index, merge in enumerate(tokenizer["model"]["merges"]):
        rank.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), index)
    special = {token["content"] for token in tokenizer["added_tokens"]}

    def kind_of(piece):
        if piece in special:
            return gguf.TokenType.CONTROL
        return gguf.TokenType.BYTE if piece.startswith("<0x") and len(piece) == 6 else gguf.TokenType.NORMAL

    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([float(-rank.get(piece, 1e6)) for piece in pieces])
    writer.add_token_types([kind_of(piece) for piece in pieces])
    writer.add_bos_token_id(vocab["<s>"])
    writer.add_eos_token_id(vocab["</s>"])
    writer.add_unk_token_id(vocab["<unk>"])
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
