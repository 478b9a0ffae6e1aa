"""Models served on several devices: the tokens of one device, no more exchange than layers need, no pool copied."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fastgpt_jax import LLM, CompileConfig, SamplingParams
from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.artifact.manifest import read_manifest, write_manifest
from fastgpt_jax.checkpoint import GenerationDefaults, LoadedModel, load_model
from fastgpt_jax.compiler.build import build_artifact
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.errors import UserError
from fastgpt_jax.models import GPT2, GPT2Config, Llama
from sharding import LogicalAxis, Rules, count_collectives, spec_of_names
from tests.filled_model import make_filled_model
from tests.sharding import placed
from tests.shared_data import shared_path

CONFIG = dataclasses.replace(placed.CONFIG, num_hidden_layers=1)
SMALL = CompileConfig(
    max_model_len=24,
    max_num_seqs=2,
    max_num_batched_tokens=8,
    prefill_buckets=(8,),
    decode_buckets=(2,),
    max_logprobs=5,
)
PROMPTS = [[1, 2, 3], [7, 11, 13, 17, 19, 23, 29, 31, 37, 41]]  # the second in two chunks
NUM_GENERATED = 8
DECODE = EntryPointKey(2, 2, "greedy", False)
GOLDEN_TOLERANCE = 1e-4  # float32 log-probabilities of the golden file, printed in full


def loaded(module, config) -> LoadedModel:
    model = make_filled_model(module, config)
    return LoadedModel(model, config, "small", None, GenerationDefaults(32), None, config.vocab_size)


def on(num_devices: int, model=None, config: CompileConfig = SMALL):
    model = loaded(Llama, CONFIG) if model is None else model
    return compile_model(model, config=dataclasses.replace(config, tensor_parallel_size=num_devices))


def greedy_tokens(model) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)
    outputs = LLM(model).generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy_tokens_of_forward(model, max_model_len: int) -> list[list[int]]:
    """The same without an engine: the whole forward for every token, on one device."""
    forward = jax.jit(lambda tokens: model(tokens))
    texts = []
    for prompt in PROMPTS:
        tokens = np.zeros((1, max_model_len), np.int32)
        tokens[0, : len(prompt)] = prompt
        for length in range(len(prompt), len(prompt) + NUM_GENERATED):
            tokens[0, length] = np.argmax(forward(tokens)[0, length - 1])
        texts.append(tokens[0, len(prompt) :][:NUM_GENERATED].tolist())
    return texts


def copies_of_pools(compiled, step) -> list[str]:
    """Instructions of the step itself (not of a fused computation) that copy an array of a pool's shape on a device."""
    shapes = {",".join(map(str, x.addressable_shards[0].data.shape)) for x in compiled.init_state()}
    entry = step.as_text().split("\nENTRY ")[1]
    found = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", entry)
    return [shape for shape in found if shape in shapes]


def test_two_devices_generate_the_tokens_of_the_forward_and_share_weights_and_caches():
    model = loaded(Llama, CONFIG)
    two = on(2, model)
    assert greedy_tokens(two) == greedy_tokens_of_forward(model.model, two.max_model_len)
    step = two.steps[DECODE].run
    # As in the plain forward: two sums a layer and one for the embedding; the logits are gathered once.
    assert count_collectives(step) == {"all-reduce": 2 * CONFIG.num_hidden_layers + 1, "all-gather": 1}
    pools = two.init_state()
    assert {x.sharding.spec for x in pools} == {PartitionSpec(None, None, None, "tensor", None)}
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in pools) // 2
    assert not copies_of_pools(two, step)
    query = two.store["layers.0.attention.query.kernel"]
    assert query.addressable_shards[0].data.shape == (32, 32) and len(query.addressable_shards) == 2


def test_too_few_devices_indivisible_heads_and_missing_rules_are_one_line():
    model = loaded(Llama, CONFIG)
    with pytest.raises(
        UserError, match=r"^heads .*num_attention_heads=16 and tensor_parallel_size=3; choose one of 1, 2$"
    ):
        on(3, model)
    with pytest.raises(UserError, match="^tensor_parallel_size=16 needs as many devices, found 8 .*$"):
        on(16, model.model)
    with pytest.raises(UserError, match="sharding_rules for a model of your own"):
        on(2, model.model)
    rules = Rules(((".*query.kernel", (LogicalAxis.HEADS, LogicalAxis.EMBED, None)),))
    with pytest.raises(UserError, match="rule for layers.0.attention.query.kernel names 3 dimensions"):
        on(2, model.model, dataclasses.replace(SMALL, sharding_rules=rules))
    rules = Rules((), {LogicalAxis.KV_HEADS: 8})
    with pytest.raises(UserError, match="kv_heads of kv0 must divide among the 3 devices"):
        on(3, model.model, dataclasses.replace(SMALL, sharding_rules=rules))


@pytest.mark.slow
def test_a_function_of_the_users_own_is_cut_by_its_rules():
    def forward(params, tokens):
        x = params["embed"][tokens]
        q, k, v = (jax.numpy.einsum("btd,dnh->btnh", x, params[name]) for name in "qkv")
        scores = jax.numpy.einsum("btnh,bsnh->bnts", q, k)
        t = jax.numpy.arange(tokens.shape[1])
        scores = jax.numpy.where(t[:, None] >= t[None], scores, -1e9)
        mixed = jax.numpy.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        return (x + jax.numpy.einsum("btnh,nhd->btd", mixed, params["o"]) + params["extra"]) @ params["embed"].T

    random = np.random.RandomState(0)
    # So wide that keys and values are cached, not what they are made of.
    shapes = {"embed": (44, 96), "q": (96, 4, 8), "k": (96, 4, 8), "v": (96, 4, 8), "o": (4, 8, 96), "extra": (96,)}
    params = {name: 0.1 * random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    heads = (None, LogicalAxis.KV_HEADS, LogicalAxis.HEAD_DIM)
    rules = Rules(
        (("[qkv]", heads), ("o", (LogicalAxis.HEADS, None, None)), ("embed", (LogicalAxis.VOCAB, LogicalAxis.EMBED))),
        {LogicalAxis.KV_HEADS: 4},
    )
    config = dataclasses.replace(SMALL, sharding_rules=rules)
    one = compile_model(forward, params, config=config)
    four = compile_model(forward, params, config=dataclasses.replace(config, tensor_parallel_size=4))
    assert not one.notes and "no rule names extra, so every device holds it whole" in four.notes["sharding_rules"]
    assert greedy_tokens(four) == greedy_tokens(one)
    assert count_collectives(four.steps[DECODE].run) == {"all-reduce": 2, "all-gather": 1}
    assert all("tensor" in x.sharding.spec for x in four.init_state())


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 4])
def test_gpt2_and_padded_sizes_are_served(num_devices: int):
    config = GPT2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = loaded(GPT2, config)
    compiled = on(num_devices, model)
    sizes = {2: "mlp 45 -> 46, vocab 61 -> 62", 4: "mlp 45 -> 48, vocab 61 -> 64"}
    assert compiled.notes == {"padding": f"{sizes[num_devices]} for tensor_parallel_size {num_devices}"}
    assert compiled.vocab_size == 61
    assert greedy_tokens(compiled) == greedy_tokens(on(1, model))


def check_goldens(llm: LLM) -> None:
    golden = json.loads((shared_path("models/stories260K") / "golden.json").read_text())
    options = {"temperature": 0, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 1}
    outputs = llm.generate(
        prompt_token_ids=[case["prompt_ids"] for case in golden],
        sampling_params=[SamplingParams(max_tokens=len(case["greedy_ids"]), **options) for case in golden],
        use_tqdm=False,
    )
    for case, output in zip(golden, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["greedy_ids"]
        found = [row[i].logprob for row, i in zip(output.prompt_logprobs[1:], case["prompt_ids"][1:], strict=True)]
        np.testing.assert_allclose(found, case["prompt_logprobs"], atol=GOLDEN_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 4])
def test_the_trained_model_keeps_its_goldens_in_process_and_from_an_artifact(num_devices: int, tmp_path: Path):
    config = CompileConfig(max_num_seqs=6, max_num_batched_tokens=32, prefill_buckets=(32,), decode_buckets=(6,))
    compiled = on(num_devices, load_model(shared_path("models/stories260K")), config)
    report = build_artifact(compiled, tmp_path / "made", name="stories")
    check_goldens(LLM(compiled))
    for step in compiled.steps.values():
        memory = step.run.memory_analysis()
        assert memory.alias_size_in_bytes == sum(x.nbytes for x in compiled.init_state()) // num_devices
        assert not copies_of_pools(compiled, step.run)
    manifest = report.manifest
    assert dict(manifest.mesh_axes)["tensor"] == manifest.environment.device_count == num_devices
    weights = {weight.name: spec_of_names(weight.spec) for weight in manifest.weights}
    assert weights["layers.0.mlp.down.kernel"] == PartitionSpec("tensor", None)
    assert {spec_of_names(state.spec) for state in manifest.state} == {PartitionSpec(None, None, None, "tensor", None)}
    llm = LLM(str(report.output), tensor_parallel_size=num_devices)
    check_goldens(llm)
    with pytest.raises(UserError, match=f"compiled for {num_devices}"):
        LLM(str(report.output), tensor_parallel_size=num_devices * 2)


@pytest.mark.slow
def test_an_artifact_of_two_devices_is_served_after_a_mismatch_and_by_a_single_device(tmp_path, monkeypatch):
    compiled = on(2)
    expected = greedy_tokens(compiled)
    report = build_artifact(compiled, tmp_path / "made", name="small")
    other = dataclasses.replace(report.manifest.environment, jaxlib="0.9.9")
    write_manifest(report.output, dataclasses.replace(report.manifest, environment=other))
    assert greedy_tokens(str(report.output)) == expected
    write_manifest(report.output, report.manifest)
    assert read_manifest(report.output) == report.manifest
    monkeypatch.setattr(jax, "devices", lambda *args, found=tuple(jax.devices()[:1]): list(found))
    with pytest.raises(UserError, match="device_count is 1, the artifact was made for 2"):
        LLM(str(report.output), on_mismatch="refuse")
    assert greedy_tokens(str(report.output)) == expected
