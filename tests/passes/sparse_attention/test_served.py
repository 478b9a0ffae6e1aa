"""Models served sparse: their tokens, what a step computes and moves, and what is told of clauses that do not fit."""

import dataclasses

import pytest
from flax import nnx

from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.compiled_cost import compiled_cost
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.entry_point import compile_entry_point
from fastgpt_jax.compiler.sparsity import check_sparsity, with_sparsity
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.errors import UserError
from fastgpt_jax.models import Llama, LlamaConfig, Mistral, MistralConfig
from passes.extract import clone
from passes.manager import PassManager, PassOptions
from passes.registry import parse_pipeline
from tests.artifact.built import tokens
from tests.filled_model import make_filled_model

LLAMA = LlamaConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
CONFIG = CompileConfig(
    max_model_len=24,
    max_num_seqs=2,
    page_size=5,
    max_num_batched_tokens=8,
    prefill_buckets=(4,),
    decode_buckets=(2,),
    max_logprobs=5,
    pass_options=PassOptions(is_validating=False),
)
QUIET = PassOptions(is_validating=False)
DECODE = EntryPointKey(2, 2, "greedy", False)


def llama():
    return make_filled_model(Llama, LLAMA)


def mistral(window, llama_config=LLAMA):
    """A Mistral with the parameters of a Llama."""
    same = {field.name for field in dataclasses.fields(MistralConfig)} - {"sliding_window"}
    config = MistralConfig(**{name: getattr(llama_config, name) for name in same}, sliding_window=window)
    graphdef, _ = nnx.split(make_filled_model(Mistral, config))
    return nnx.merge(graphdef, nnx.split(make_filled_model(Llama, llama_config))[1])


def compiled_as(model, **fields):
    return compile_model(model, config=dataclasses.replace(CONFIG, **fields))


def decode_cost(compiled):
    entry = compile_entry_point(compiled.trace(DECODE))
    return compiled_cost(entry.compiled)


def rows_read(compiled):
    """Rows of a cache that a decode step reads, by what the pass says."""
    (run,) = [run for run in compiled.trace(DECODE).passes if run.name == "narrow_reads"]
    return [str(note) for note in run.result.notes]


@pytest.mark.slow
def test_a_llama_made_sparse_is_the_mistral_of_its_parameters():
    sparse = compiled_as(llama(), sparse="all: window(3)")
    narrow = compiled_as(mistral(3), pipeline="simplify,attention,narrow_reads,simplify")
    plain = compiled_as(mistral(3))
    assert "3 of 24 rows of keys and values are read" in rows_read(sparse)[0]
    assert rows_read(sparse)[0].split(": ")[-1] == rows_read(narrow)[0].split(": ")[-1]
    found = tokens(LLM(sparse))
    assert found == tokens(LLM(narrow)) == tokens(LLM(plain))
    assert found != tokens(LLM(compiled_as(llama())))  # else the comparison says nothing


@pytest.mark.slow
def test_as_many_heads_share_keys_as_there_are_keys():
    """Heads that share keys may be taken for queries: as many as keys are no positions either."""
    shape = {"num_attention_heads": 24, "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 1}
    config = dataclasses.replace(LLAMA, **shape)
    sparse = compiled_as(make_filled_model(Llama, config), sparse="heads[0:24]: window(3)")
    assert config.num_attention_heads == CONFIG.max_model_len
    assert "3 of 24 rows of keys and values are read" in rows_read(sparse)[0]
    assert tokens(LLM(sparse)) == tokens(LLM(compiled_as(mistral(3, config))))


@pytest.mark.slow
def test_reads_narrowed_serve_the_tokens_of_a_mask_over_all_scores():
    text = "layers[0]: window(4) | sinks(2); heads[0:half]: window(3); all: sinks(1) | window(2)"
    sparse = compiled_as(llama(), sparse=text)
    masked = compiled_as(llama(), sparse=text)
    pipeline = with_sparsity(parse_pipeline("simplify"), text, 24, 2)
    masked.manager = PassManager([entry for entry in pipeline if entry.name != "narrow_reads"], QUIET)
    assert not [run for run in masked.trace(DECODE).passes if run.name == "narrow_reads"]
    assert tokens(LLM(sparse)) == tokens(LLM(masked))


@pytest.mark.slow
def test_a_decode_step_reads_no_more_of_a_longer_context():
    """The page table grows by a number a page, and nothing else does; a mask alone saves nothing."""
    short, long = (compiled_as(llama(), sparse="all: window(8)|sinks(2)", max_model_len=n) for n in (64, 256))
    # No kernel: one that walks blocks as far as a request has come has a loop whose trips XLA's module does not tell.
    dense = compiled_as(llama(), max_model_len=256, pipeline="simplify,attention")
    costs = [decode_cost(compiled) for compiled in (short, long, dense)]
    assert costs[0].dot_flops == costs[1].dot_flops < costs[2].dot_flops / 2
    assert abs(costs[1].bytes_read - costs[0].bytes_read) < 4 * 4 * 2 * (256 - 64) / 5
    assert costs[1].bytes_read < costs[2].bytes_read / 2
    masked = compiled_as(llama(), max_model_len=256)
    pipeline = with_sparsity(parse_pipeline("simplify"), "all: window(8)|sinks(2)")
    masked.manager = PassManager([entry for entry in pipeline if entry.name != "narrow_reads"], QUIET)
    assert decode_cost(masked).dot_flops == costs[2].dot_flops


@pytest.fixture(scope="module")
def sparse():
    return compiled_as(llama(), sparse="all: window(3)")


def test_clauses_are_held_against_the_layers_of_the_model(sparse):
    graph = sparse.captured.graph
    checked = {"is_unrolled": True, "is_strict": False}
    assert check_sparsity(graph, "layers[1]: full", **checked) == (2, "layers[1]: full over 2 layers")
    _, line = check_sparsity(graph, "all: window(3); heads[0]: full", **checked)
    assert line.endswith("over 2 layers; decides about no head: 'heads[0]: full'")
    with pytest.raises(UserError, match=r"no head, since earlier ones do: 'heads\[0\]: full'; leave them out"):
        check_sparsity(graph, "all: window(3); heads[0]: full", is_unrolled=True, is_strict=True)
    with pytest.raises(UserError, match=r"sparse 'layers\[2\]: full' at character 1: layers\[2\] reaches outside"):
        check_sparsity(graph, "layers[2]: full", **checked)


def test_a_mistake_in_the_text_is_told_before_any_work():
    with pytest.raises(UserError, match=r"sparse 'all: windw\(3\)' at character 6: there must be a rule"):
        CompileConfig(sparse="all: windw(3)")


def test_a_step_in_which_layers_are_missed_is_refused(sparse):
    manager = PassManager(with_sparsity(parse_pipeline("simplify"), "all: window(3)", 24, 3), QUIET)
    with pytest.raises(UserError, match="needs all 3 layers of attention recognised in a step, and 2 are"):
        manager.run(clone(sparse.captured.graph))
