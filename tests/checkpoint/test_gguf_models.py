"""A model written as GGUF by the `gguf` package is the model it was, and every mistake in a file is one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fastgpt_jax
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.checkpoint.gguf.reader import GGUFFile
from fastgpt_jax.errors import UserError
from fastgpt_jax.models.layers.rope import Llama3Scaling, make_frequencies
from tests.checkpoint.folders import CONFIG, edit_json, make_folder
from tests.checkpoint.gguf_files import GGML, gguf, write_gguf
from tests.shared_data import shared_path

LENGTH = 72  # Every golden prompt and its continuation, padded to one length so that one compile serves all.


@nnx.jit
def log_probabilities(model, tokens):
    return jax.nn.log_softmax(model(tokens), axis=-1)


def read_golden():
    return json.loads((shared_path("models/stories260K") / "golden.json").read_text())


def rows_after(model, case):
    ids = case["prompt_ids"] + case["greedy_ids"]
    tokens = jnp.asarray([ids + [0] * (LENGTH - len(ids))], jnp.int32)
    return np.asarray(log_probabilities(model, tokens))[0, len(case["prompt_ids"]) - 1 : len(ids) - 1]


def assert_equal_leaves(ours, theirs):
    ours, theirs = (nnx.to_flat_state(nnx.state(loaded.model)) for loaded in (ours, theirs))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, left), (_, right) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(left.get_value(), right.get_value(), err_msg=str(path))


def assert_refused(path, *needles, **options):
    with pytest.raises(UserError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}], ids=str)
def test_a_small_model_comes_back_bit_for_bit(tmp_path, options):
    """With biases on queries, keys and values alone it is a Qwen2, whose rows are in their own order."""
    make_folder(tmp_path / "hf", dataclasses.replace(CONFIG, **options))
    theirs = load_model(tmp_path / "hf")
    ours = load_model(write_gguf(tmp_path / "hf", tmp_path / "m.gguf"))
    assert dataclasses.replace(ours.config, rms_norm_eps=1e-5) == theirs.config
    assert ours.config.rms_norm_eps == np.float32(1e-5)
    assert (ours.name, ours.tokenizer, ours.chat_template, ours.generation.max_model_len) == ("m", None, None, 32)
    assert_equal_leaves(ours, theirs)


def test_a_folder_that_holds_one_file_is_that_file(folder, tmp_path):
    (tmp_path / "g").mkdir()
    path = write_gguf(folder, tmp_path / "g" / "a.gguf")
    assert load_model(tmp_path / "g").name == "a"
    (tmp_path / "g" / "config.json").write_text("{}")
    assert load_model(tmp_path / "g").name == "a"
    (tmp_path / "g" / "b.gguf").write_bytes(path.read_bytes())
    assert_refused(tmp_path / "g", "2 GGUF files (a.gguf, b.gguf)", "name one")
    (folder / "a.gguf").write_bytes(b"")
    assert load_model(folder).name == "hf"
    assert_refused(folder / "b.gguf", "no such file", "b.gguf")


def test_a_model_in_parts_is_read_from_its_first(folder, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    write_gguf(folder, parts / "m.gguf", split_max_tensors=8)
    names = sorted(path.name for path in parts.iterdir())
    assert names[0] == f"m-00001-of-{len(names):05}.gguf" and len(names) > 2
    assert_equal_leaves(load_model(parts), load_model(folder))
    assert_refused(parts / names[1], "is one of", "name the first")
    (parts / names[1]).unlink()
    assert_refused(parts, names[1], "missing")


def test_dtype_follows_the_matrices(folder, tmp_path):
    expected = {GGML.F32: "float32", GGML.F16: "float16", GGML.BF16: "bfloat16"}
    for kind, dtype in expected.items():
        path = write_gguf(folder, tmp_path / "m.gguf", kind)
        assert load_model(path).config.dtype == dtype
    assert load_model(path, dtype="float32").config.dtype == "float32"
    assert load_model(path, max_model_len=9).generation.max_model_len == 9
    assert_refused(path, "dtype must be one of", dtype="int8")


def test_quantized_matrices_are_dequantized_and_served_in_bfloat16(tmp_path):
    config = dataclasses.replace(CONFIG, hidden_size=32, intermediate_size=64)
    make_folder(tmp_path / "hf", config)
    theirs = load_model(tmp_path / "hf").model
    path = write_gguf(tmp_path / "hf", tmp_path / "m.gguf", GGML.Q8_0)
    assert {place.type.name for place in GGUFFile(path).tensors.values()} == {"F32", "Q8_0"}
    assert load_model(path).config.dtype == "bfloat16"
    ours = load_model(path, dtype="float32").model
    for layer in ("query", "key", "value", "output"):
        left, right = (getattr(model.layers[1].attention, layer).kernel[...] for model in (ours, theirs))
        assert 0 < abs(left - right).max() < abs(right).max() / 127  # half a step of a block, at the most


def test_llama3_scaling_comes_from_the_listed_factors(folder, tmp_path):
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 16)
    unscaled, scaled = (make_frequencies(8, 10000.0, way).astype(np.float64) for way in (None, scaling))
    tensors = {"rope_freqs.weight": (unscaled / scaled).astype(np.float32)}
    config = load_model(write_gguf(folder, tmp_path / "m.gguf", tensors=tensors)).config
    np.testing.assert_allclose(make_frequencies(8, config.rope_theta, config.rope_scaling), scaled, rtol=3e-7)
    tensors = {"rope_freqs.weight": np.ones(3, np.float32)}
    assert_refused(write_gguf(folder, tmp_path / "m.gguf", tensors=tensors), "rope_freqs.weight", "4 positive", "(3,)")


def test_rope_scaling_is_read_and_what_is_not_supported_is_refused(folder, tmp_path):
    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        writer.add_rope_scaling_attn_factors(2.0)

    def load(change):
        return load_model(write_gguf(folder, tmp_path / "m.gguf", change=change)).config.rope_scaling

    assert (type(load(linear)).__name__, load(linear).factor) == ("LinearScaling", 4.0)
    assert load(yarn).original_max_position_embeddings == 16
    assert load(yarn).amplitude == pytest.approx(2 * (0.1 * np.log(4) + 1))
    with pytest.raises(UserError, match="expert_count=8"):
        load(lambda writer: writer.add_expert_count(8))
    with pytest.raises(UserError, match="rope.dimension_count=4"):
        load(lambda writer: writer.add_rope_dimension_count(4))


def test_wrong_beginnings_are_told_apart(folder, tmp_path):
    path = tmp_path / "m.gguf"
    for start, needle in {
        b"PK\x03\x04rest": "not a GGUF file: it begins with b'PK",
        b"GGUF": "truncated",
        b"GGUF\x01\0\0\0": "version 1; supported are 2 and 3",
        b"version https://git-lfs": "Git LFS pointer",
    }.items():
        path.write_bytes(start)
        assert_refused(path, "m.gguf", needle)
    write_gguf(folder, path, endianess=gguf.GGUFEndian.BIG)
    assert_refused(path, "m.gguf", "big-endian", "convert the model again")


def test_a_file_cut_anywhere_is_called_truncated(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "m.gguf")
    data = path.read_bytes()
    for length in [*range(8, 2000, 37), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        assert_refused(path, "truncated", "fetch it again")


def test_damaged_metadata_never_end_in_a_traceback(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "m.gguf")
    data = path.read_bytes()
    generator, num_refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(data[:3000])
        for position in generator.integers(8, 2600, 3):
            damaged[position] = generator.integers(256)
        path.write_bytes(bytes(damaged) + data[3000:])
        try:
            file = GGUFFile(path)
            for name in file.tensors:
                file.read(name)
        except UserError as error:
            num_refused += 1
            assert "\n" not in str(error)
    assert num_refused > 50


def test_unsupported_types_architectures_and_files_without_weights_are_refused(folder, tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    blocks = np.zeros((2, gguf.GGML_QUANT_SIZES[GGML.IQ4_XS][1]), np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=GGML.IQ4_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(path, "m.gguf", "token_embd.weight is of type IQ4_XS", "Q4_K")
    edit_json(folder / "config.json", model_type="gemma")
    assert_refused(write_gguf(folder, path), "architecture 'gemma'", "llama, qwen2", "Hugging Face folder")
    assert_refused(shared_path("tokenizers/ggml-vocab-gpt-2.gguf"), "a vocabulary alone")


def test_missing_settings_tensors_and_tokenizers_are_refused(folder, tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((23, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_refused(path, "(llama.*) must give embedding_length")
    write_gguf(folder, path, tensors={"blk.7.attn_q.weight": np.zeros((32, 16), np.float32)})
    assert_refused(path, "holds tensor model.layers.7.self_attn.q_proj.weight")

    def refuse(needle, **fields):
        def change(writer):
            writer.add_token_list(["a", "b"])
            for name, value in fields.items():
                getattr(writer, name)(value)

        assert_refused(write_gguf(folder, path, change=change), "m.gguf", needle)

    refuse("must give tokenizer.ggml.model")
    refuse("model 'bert'", add_tokenizer_model="bert")
    refuse("must give tokenizer.ggml.pre", add_tokenizer_model="gpt2")
    refuse("'poro-chat', which are not supported", add_tokenizer_model="gpt2", add_tokenizer_pre="poro-chat")
    refuse("tokenizer.ggml.merges", add_tokenizer_model="gpt2", add_tokenizer_pre="gpt-2")
    two_words = {"add_tokenizer_model": "gpt2", "add_tokenizer_pre": "gpt-2", "add_token_merges": ["ab"]}
    refuse("the merge 'ab'", **two_words)
    refuse("does not hold a BPE tokenizer", **two_words | {"add_token_merges": ["a c"]})
    refuse("2 tokens and 1 scores", add_tokenizer_model="llama", add_token_scores=[1.0])
    llama = {"add_tokenizer_model": "llama", "add_token_scores": [1.0, 2.0]}
    refuse("special token 9, but has 2 tokens", **llama, add_eos_token_id=9)


@pytest.mark.parametrize("kind", [pytest.param("F32", marks=pytest.mark.slow), "F16"])
def test_stories_give_their_golden_tokens_from_gguf(kind, tmp_path):
    folder = shared_path("models/stories260K")
    loaded = load_model(write_gguf(folder, tmp_path / "s.gguf", GGML[kind]), dtype="float32")
    for case in read_golden():
        assert rows_after(loaded.model, case).argmax(-1).tolist() == case["greedy_ids"]
        assert loaded.tokenizer.encode(case["prompt"]) == case["prompt_ids"]
    assert (loaded.generation.eos_token_ids, loaded.generation.bos_token_id) == ((2,), 1)
    assert loaded.chat_template == "{{ bos_token }}{{ messages[0].content }}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("Q8_0", 0.03), ("Q5_1", 0.25), ("Q5_0", 0.25), ("Q4_1", 0.5), ("Q4_0", 0.5)]
)
def test_stories_stay_near_their_log_probabilities_when_quantized(kind, tolerance, tmp_path):
    """The tolerances are twice the worst mean distance measured (0.014, 0.122 and 0.239 for 8, 5 and 4 bits)."""
    folder = shared_path("models/stories260K")
    exact = load_model(folder).model
    model = load_model(write_gguf(folder, tmp_path / "s.gguf", GGML[kind]), dtype="float32").model
    for case in read_golden():
        best = rows_after(exact, case).argmax(-1)[:, None]
        distance = [np.take_along_axis(rows_after(way, case), best, -1) for way in (exact, model)]
        assert abs(distance[0] - distance[1]).mean() < tolerance


@pytest.mark.slow
def test_a_gguf_file_is_served_like_a_folder(tmp_path):
    golden = read_golden()
    path = write_gguf(shared_path("models/stories260K"), tmp_path / "s.gguf", GGML.F16)
    llm = fastgpt_jax.LLM(str(path), dtype="float32", max_model_len=LENGTH)
    params = [
        fastgpt_jax.SamplingParams(temperature=0, ignore_eos=True, max_tokens=len(c["greedy_ids"])) for c in golden
    ]
    outputs = llm.generate([case["prompt"] for case in golden], params, use_tqdm=False)
    for case, output in zip(golden, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["greedy_ids"]
