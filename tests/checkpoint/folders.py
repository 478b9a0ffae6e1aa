"""Tiny model folders to load and to damage."""

import json
import struct
from pathlib import Path

from fastgpt_jax.checkpoint import export_model
from fastgpt_jax.models import Llama, LlamaConfig
from tests.filled_model import make_filled_model

CONFIG = LlamaConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)


def make_folder(folder: Path, config: LlamaConfig = CONFIG, **options) -> Llama:
    """Writes a model with random parameters and returns it."""
    model = make_filled_model(Llama, config)
    export_model(model, config, folder, **options)
    return model


def edit_json(path: Path, **values) -> None:
    """Sets entries of a JSON file; None removes one."""
    entries = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def split_into_shards(folder: Path) -> list[str]:
    """Turns model.safetensors into two shards and their index, with no help from the code under test."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    names = sorted(header)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        new_header, body = {}, b""
        for name in members:
            begin, end = header[name]["data_offsets"]
            offsets = [len(body), len(body) + end - begin]
            new_header[name] = header[name] | {"data_offsets": offsets}
            body += data[8 + length + begin : 8 + length + end]
        encoded = json.dumps(new_header).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    (folder / "model.safetensors").unlink()
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return list(shards)
