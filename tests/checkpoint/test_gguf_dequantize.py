"""Every tensor type gives the values of the `gguf` package, bit for bit."""

import numpy as np
import pytest

from fastgpt_jax.checkpoint.gguf.dequantize import OTHER_TYPES, TENSOR_TYPES

gguf = pytest.importorskip("gguf")
QUANTIZED = [kind for kind, known in TENSOR_TYPES.items() if known.unpack is not None]


def test_sizes_and_names_are_those_of_the_format():
    for kind, known in TENSOR_TYPES.items():
        theirs = gguf.GGMLQuantizationType(kind)
        assert (known.name, known.block, known.record.itemsize) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])
    assert {kind: gguf.GGMLQuantizationType(kind).name for kind in OTHER_TYPES} == dict(OTHER_TYPES)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: TENSOR_TYPES[kind].name)
def test_any_bytes_are_the_same_values(kind, monkeypatch):
    monkeypatch.setattr("fastgpt_jax.checkpoint.gguf.dequantize._CHUNK_VALUES", 100 * 32)
    known = TENSOR_TYPES[kind]
    num_blocks = 6 * 51
    blocks = np.random.default_rng(kind).integers(0, 256, (num_blocks, known.record.itemsize), np.uint8)
    records = blocks.view(known.record)[:, 0]
    for field in set(known.record.names) & {"d", "m"}:  # finite scales, subnormal and negative ones among them
        records[field] = np.random.default_rng(1).standard_normal(num_blocks) * 10.0 ** (np.arange(num_blocks) % 11 - 7)
    shape = (6, 51 * known.block)
    ours = known.decode(blocks.reshape(-1), shape)
    theirs = gguf.quants.dequantize(blocks.reshape(6, -1), gguf.GGMLQuantizationType(kind))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.reshape(shape).view(np.uint32))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_values_are_views_of_the_bytes(name):
    (kind,) = [kind for kind, known in TENSOR_TYPES.items() if known.name == name]
    values = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    theirs = gguf.GGMLQuantizationType(kind)
    data = gguf.quants.quantize(values, theirs).view(np.uint8).reshape(-1)
    ours = TENSOR_TYPES[kind].decode(data, (3, 8))
    assert np.shares_memory(ours, data)
    np.testing.assert_array_equal(
        ours.astype(np.float32), gguf.quants.dequantize(data.reshape(3, -1), theirs).astype(np.float32)
    )
