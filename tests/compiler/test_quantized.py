"""Quantized models as they are served and stored."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.compiler.build import build_artifact
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.quantization import read_rules
from fastgpt_jax.engine.args import CHOICES
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.errors import UserError
from fastgpt_jax.models import Llama
from fastgpt_jax.sampling.params import SamplingParams
from passes.incremental.row_format import ROW_FORMATS
from passes.manager import PassOptions
from passes.quantization.rules import QuantizationRule
from passes.quantization.schemes import SCHEMES, dequantize, quantize
from tests.artifact.built import CONFIG, LLAMA, tokens
from tests.filled_model import make_filled_model
from tests.shared_data import shared_path

QUICK = dataclasses.replace(CONFIG, pass_options=PassOptions(is_validating=False))
TIED = dataclasses.replace(LLAMA, tie_word_embeddings=True)


def config(**fields) -> CompileConfig:
    return dataclasses.replace(QUICK, **fields)


def with_rounded_weights(model, scheme):
    """The model with every matrix rounded along the axis that products contract."""

    def near(path, leaf):
        if leaf.ndim != 2:
            return leaf
        is_table = "embed" in jax.tree_util.keystr(path)
        rows = leaf if is_table else leaf.T
        rounded = dequantize(*quantize(rows, SCHEMES[scheme]), SCHEMES[scheme])
        return rounded if is_table else rounded.T

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(near, state))


@pytest.mark.slow
@pytest.mark.parametrize("scheme, shape", [("w4a16", TIED), ("w8a16", LLAMA), ("w4a16", LLAMA)])
def test_served_tokens_are_those_of_a_model_with_rounded_weights(scheme, shape):
    model = make_filled_model(Llama, shape)
    compiled = compile_model(model, config=config(quantization=scheme))
    plain = compile_model(with_rounded_weights(model, scheme), config=QUICK)
    exact = compile_model(model, config=QUICK)
    found = tokens(LLM(compiled))
    assert found == tokens(LLM(plain))
    if scheme == "w4a16":
        assert found != tokens(LLM(exact))  # else the comparison says nothing
    assert compiled.certificate.worst_error == exact.certificate.worst_error


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a16", "w4a8", "fp8"])  # every way of storing a weight
def test_an_artifact_holds_no_float_copy_of_a_quantized_weight(scheme, tmp_path):
    model = load_model(shared_path("models/stories260K"))
    small = CompileConfig(
        max_model_len=32,
        max_num_seqs=1,
        prefill_buckets=(16,),
        quantization=scheme,
        pass_options=PassOptions(is_validating=False),
    )
    compiled = compile_model(model, config=small)
    manifest = build_artifact(compiled, tmp_path / "artifact", name="stories").manifest
    shapes = [leaf.shape for leaf in compiled.leaves]
    matrices = [shape for shape in shapes if len(shape) == 2]
    stored = [w for w in manifest.weights if w.dtype == {4: "uint8", 8: SCHEMES[scheme].dtype}[SCHEMES[scheme].bits]]
    assert len(stored) == len(matrices)  # the tied table among them once
    assert sum(np.prod(w.shape) for w in stored) == sum(-(-np.prod(s) * SCHEMES[scheme].bits // 8) for s in matrices)
    floats = [w for w in manifest.weights if w not in stored]
    norms = sum(np.prod(s) for s in shapes if len(s) == 1)
    scales = sum(np.prod(w.shape) for w in floats) - norms
    groups = [SCHEMES[scheme].num_groups(64 if s[0] in (64, 512) else s[0]) for s in matrices]
    channels = [s[0] if s[0] == 512 else s[1] for s in matrices]
    assert scales == sum(g * c for g, c in zip(groups, channels, strict=True))
    # And no file has room for one.
    weight_bytes = sum(f.nbytes for f in manifest.files if f.path.startswith("weights/"))
    named = sum(np.prod(w.shape) * jnp.dtype(w.dtype).itemsize for w in manifest.weights)
    assert weight_bytes - named < 64 * len(manifest.weights) + 40_000  # padding and header
    for entry in manifest.entry_points:
        (record,) = [record for record in entry.passes if record.name == "quantize_weights"]
        assert (record.detail, record.numerics, record.matched) == (scheme, "approximate", len(matrices) + 1)
    params = {"temperature": 0, "max_tokens": 4}
    prompt = {"prompt_token_ids": [[1, 2, 3]], "use_tqdm": False}
    again = LLM(str(tmp_path / "artifact")).generate(**prompt, sampling_params=params_of(params))
    here = LLM(compiled).generate(**prompt, sampling_params=params_of(params))
    assert again[0].outputs[0].token_ids == here[0].outputs[0].token_ids


def params_of(values):
    return SamplingParams(**values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_caches_are_stored_rounded_and_served_from(name):
    model = make_filled_model(Llama, LLAMA)
    compiled = compile_model(model, config=config(kv_cache_dtype=name))
    dtype = ROW_FORMATS[name].dtype
    entries = compiled.layout.entries
    assert {(e.dtype, e.scale_dtype) for e in entries} == {(dtype, "bfloat16")}
    # Two KV heads of eight numbers and a scale each, keys and values of two layers.
    assert compiled.layout.bytes_per_token == 4 * 2 * (8 + 2)
    assert {str(x.dtype) for x in compiled.init_state()} == {dtype, "bfloat16"}
    state_bytes = sum(x.nbytes for x in compiled.init_state())
    layout = compiled.layout
    assert state_bytes == layout.num_pages * layout.page_size * layout.bytes_per_token
    llm, exact = LLM(compiled), LLM(compile_model(model, config=QUICK))
    found, want = scores(llm), scores(exact)
    error = np.abs(found - want).max()
    assert 0 < error < {"int8": 0.2, "fp8": 1.0}[name]  # nats, of a random model with large logits


def scores(llm) -> np.ndarray:
    params = params_of({"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1})
    prompt = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    (output,) = llm.generate(prompt_token_ids=[prompt], sampling_params=params, use_tqdm=False)
    return np.array([row[t].logprob for t, row in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)])


def test_a_rule_that_is_about_nothing_is_told_and_strictly_an_error():
    rules = (QuantizationRule("no such weight", "dot", SCHEMES["w8a16"]),)
    model = make_filled_model(Llama, LLAMA)
    with pytest.raises(UserError, match="about no weight of the model: 'no such weight' for dot; weights are named"):
        compile_model(model, config=config(quantization_rules=rules, is_strict=True))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ("[3]", "rule 0 of .* must be an object"),
        ('[{"pattern": "a"}]', "must have a scheme"),
        ('[{"pattern": "a", "scheme": null, "bits": 4}]', "unknown field 'bits'"),
        ('[{"pattern": "(", "scheme": null}]', "no regular expression"),
        ('[{"pattern": 3, "scheme": null}]', "regular expression as pattern"),
        ('[{"pattern": "a", "scheme": "w3"}]', "scheme of w8a16"),
        ('[{"pattern": "a", "scheme": ["w8a16"]}]', "scheme of w8a16"),
        ('[{"pattern": "a", "op": "mul", "scheme": null}]', "op of dot, gather"),
    ],
)
def test_a_mistake_in_a_rules_file_is_one_line(text, message, tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_rules(path)
    assert "\n" not in str(error.value)


def test_rules_are_read_in_order(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([{"pattern": "a", "scheme": "fp8", "op": "dot"}, {"pattern": "b", "scheme": None}]))
    assert read_rules(path) == (QuantizationRule("a", "dot", SCHEMES["fp8"]), QuantizationRule("b", "*", None))
    with pytest.raises(UserError, match="cannot read"):
        read_rules(tmp_path / "absent.json")


def test_engine_and_compiler_know_the_same_names():
    assert CHOICES["quantization"] == (None, *SCHEMES)
    assert CHOICES["kv_cache_dtype"] == ("auto", *ROW_FORMATS)


def test_a_scheme_that_is_none_is_refused():
    with pytest.raises(UserError, match="quantization must be one of w8a16"):
        CompileConfig(quantization="int8")
    with pytest.raises(UserError, match="kv_cache_dtype must be one of auto, int8, fp8"):
        CompileConfig(kv_cache_dtype="int4")
