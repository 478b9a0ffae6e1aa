"""Steps whose rows share requests and pages: prompts in several rows beside decodes, and prefixes read by others.

The one idea: what a step computes is compared with the plain forward of each request alone, from memory in which every
row that nobody wrote is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax import CompileConfig
from fastgpt_jax.checkpoint import GenerationDefaults, LoadedModel
from fastgpt_jax.compiler.capture import as_forward, capture
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.program import Program, make_program
from fastgpt_jax.errors import UserError
from fastgpt_jax.models import GPT2, Gemma, GemmaConfig, GPT2Config, Mistral, MistralConfig
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs
from passes.incremental.derive import derive
from tests.compiler import zoo
from tests.compiler.serving import PAGE_SIZE, derive_model, poisoned
from tests.filled_model import make_filled_model

CHUNK, NUM_ROWS = 4, 4
LENGTH = 20
PREFIX = 2 * PAGE_SIZE  # tokens that the third request has in common with the first


@dataclasses.dataclass(frozen=True)
class Part:
    """A row of a step: tokens `start` to `stop` of a request."""

    request: int
    start: int
    stop: int


# A chunked prompt in several rows, in no order, beside the start of another; a decode beside the rest of the prompt;
# the third request begins behind the pages it shares, twice in one step, and all of them decode together.
STEPS: list[list[Part]] = [
    [Part(0, 8, 10), Part(1, 0, 3), Part(0, 0, 4), Part(0, 4, 8)],
    [Part(1, 3, 4), Part(0, 10, 14)],
    [Part(2, 14, 16), Part(0, 14, 15), Part(2, 10, 14), Part(1, 4, 5)],
    [Part(1, 5, 6), Part(2, 16, 17), Part(0, 15, 16)],
    [Part(2, 17, 18), Part(0, 16, 17), Part(0, 17, 18)],  # as if one of the tokens had been guessed
]


def make_requests(vocab_size: int) -> np.ndarray:
    tokens = np.random.default_rng(5).integers(1, vocab_size, (3, LENGTH), dtype=np.int32)
    tokens[2, :PREFIX] = tokens[0, :PREFIX]
    return tokens


def make_page_table(pages_per_request: int, num_pages: int) -> np.ndarray:
    """Pages i32 [3, M] out of order; the third request's first two are the first's, and page 0 belongs to nobody."""
    pages = np.random.default_rng(6).permutation(np.arange(1, num_pages, dtype=np.int32))
    table = pages[: 3 * pages_per_request].reshape(3, pages_per_request)
    table[2, : PREFIX // PAGE_SIZE] = table[0, : PREFIX // PAGE_SIZE]
    table[1, 2:] = 0  # past what it needs
    return table


def make_inputs(parts: Sequence[Part], requests: np.ndarray, pages: np.ndarray) -> StepInputs:
    """A step with the parts as rows; the rest are idle and name what is not theirs."""
    tokens = np.ones((NUM_ROWS, CHUNK), np.int32)
    num_new, cache_len = np.zeros(NUM_ROWS, np.int32), np.full(NUM_ROWS, 3, np.int32)
    table = np.repeat(pages[:1], NUM_ROWS, axis=0)
    for row, part in enumerate(parts):
        tokens[row, : part.stop - part.start] = requests[part.request, part.start : part.stop]
        num_new[row], cache_len[row], table[row] = part.stop - part.start, part.start, pages[part.request]
    slots = np.zeros(NUM_ROWS, np.int32)
    return StepInputs(tokens.reshape(-1), num_new, table, cache_len, slots, np.zeros(tokens.size, np.int32))


def serve(
    step: Callable[[Any, StepInputs], tuple[Any, Any]],
    state: Any,
    requests: np.ndarray,
    pages: np.ndarray,
    steps: Sequence[Sequence[Part]] = STEPS,
) -> list[tuple[Part, Any]]:
    """Runs steps; returns what came out of each row."""
    found = []
    for parts in steps:
        out, state = step(state, make_inputs(parts, requests, pages))
        out = jax.device_get(out)
        found += [(part, jax.tree.map(lambda x, row=row: x[row], out)) for row, part in enumerate(parts)]
    return found


def enlarged(program: Program) -> Program:
    return dataclasses.replace(program, num_pages=program.num_pages + 1)


@pytest.mark.parametrize(
    ("name", "unroll"),
    [("gqa_repeated", True), pytest.param("scan_layers", True, marks=pytest.mark.slow), ("scan_layers", False)],
)
def test_rows_of_one_request_and_shared_pages_give_the_logits_of_the_forward(name: str, unroll: bool):
    (model,) = [m for m in zoo.SERVED if m.name == name]
    derived = derive_model(model, unroll=unroll)
    program = enlarged(derived.program)
    layout = program.layout()
    assert layout.form == "ragged"
    requests = make_requests(31)
    full = derived.full_logits(requests)
    leaves = jax.tree.leaves(derived.params)
    run = zoo.quick_jit(lambda s, i: program.logits(leaves, s, i, last_row=False)[::2], donate_argnums=0)
    pages = make_page_table(layout.pages_per_request(model.capacity), program.num_pages)
    with zoo.jax_defaults():
        found: list[tuple[Part, np.ndarray]] = serve(run, poisoned(program.init_state()), requests, pages)
    for part, logits in found:
        wanted = full[part.request, part.start : part.stop]
        error = np.abs(logits[: part.stop - part.start] - wanted).max()
        assert error <= model.tolerance * np.abs(full).max(), part  # false for NaN too


@pytest.mark.parametrize("model", [m for m in zoo.SERVED if m.name in ("scan_layers_recurrent", "shift_pad")])
def test_programs_that_carry_state_take_a_request_once_a_step(model: zoo.ZooModel):
    assert derive_model(model).program.layout().form == "rectangular"


GPT2_CONFIG = GPT2Config(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=32,
)
GEMMA = GemmaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    local_layers=(True, False),
    sliding_window=6,
    query_pre_attn_scalar=4.0,
    final_logit_softcapping=30.0,
)
MISTRAL = MistralConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    sliding_window=6,
)


def make_compiled(num_devices: int, kv_cache_dtype: str) -> Compiled:
    """A model whose queries see windows, compiled with every pass of the default pipeline."""
    model = make_filled_model(Mistral, MISTRAL)
    loaded = LoadedModel(model, MISTRAL, "windowed", None, GenerationDefaults(32), None, MISTRAL.vocab_size)
    config = CompileConfig(
        max_model_len=LENGTH,
        max_num_seqs=4,
        page_size=PAGE_SIZE,
        max_logprobs=MISTRAL.vocab_size,
        tensor_parallel_size=num_devices,
        kv_cache_dtype=kv_cache_dtype,
    )
    return compile_model(loaded, config=config)


def log_probabilities(outputs: StepOutputs) -> np.ndarray:
    """Of every token, in order of ids, f32 [V]."""
    return np.asarray(outputs.top_logprobs)[np.argsort(outputs.top_ids)]


@pytest.mark.parametrize(
    ("num_devices", "kv_cache_dtype"),
    [pytest.param(1, "auto", marks=pytest.mark.slow), (2, "auto"), pytest.param(1, "int8", marks=pytest.mark.slow)],
)
def test_compiled_steps_mix_chunks_and_decodes(num_devices: int, kv_cache_dtype: str):
    compiled = make_compiled(num_devices, kv_cache_dtype)
    requests = make_requests(MISTRAL.vocab_size)
    pages = make_page_table(compiled.layout.pages_per_request(LENGTH), compiled.layout.num_pages)

    def step(state: Any, inputs: StepInputs) -> tuple[StepOutputs, Any]:
        outputs, state = compiled.step(state, inputs, None, variant="greedy")
        return dataclasses.replace(outputs, score=None), state

    def from_poison(steps: list[list[Part]]) -> dict[Part, np.ndarray]:
        state = [jax.device_put(poisoned(x), x.sharding) for x in compiled.init_state()]
        return {part: log_probabilities(out) for part, out in serve(step, state, requests, pages, steps)}

    together = from_poison(STEPS)
    alone = from_poison([[part] for parts in STEPS for part in sorted(parts, key=lambda part: part.start)])
    (key,) = compiled.steps
    assert (key.num_requests, key.chunk_len) == (NUM_ROWS, CHUNK), "one step serves prefill, chunks and decode"
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(compiled.captured.forward(compiled.captured.params, tokens)))
    full = np.asarray(forward(requests))
    for part, found in together.items():
        np.testing.assert_allclose(found, alone[part], atol=1e-5)  # sums over padding in another order
        if kv_cache_dtype == "auto":
            np.testing.assert_allclose(found, full[part.request, part.stop - 1], atol=1e-4)


def test_pages_that_do_not_hold_a_request_are_refused():
    program = derive_model(next(m for m in zoo.SERVED if m.name == "mha")).program
    with pytest.raises(UserError, match="^num_pages must be at least 4, the pages of 8 tokens .* 32 tokens .* got 3"):
        make_program(program.graph, program.plan, num_slots=2, unroll=True, page_size=8, num_pages=3)


@pytest.mark.parametrize("last_row", [True, False])
def test_hidden_is_what_the_vocabulary_projection_reads_in_the_last_valid_token(last_row: bool):
    (model,) = [m for m in zoo.SERVED if m.name == "mha"]
    derived = derive_model(model)
    program = enlarged(derived.program)
    requests = make_requests(31)
    pages = make_page_table(program.layout().pages_per_request(model.capacity), program.num_pages)
    run = zoo.quick_jit(lambda s, i: program.logits(jax.tree.leaves(derived.params), s, i, last_row=last_row))
    with zoo.jax_defaults():
        logits, hidden, _ = run(poisoned(program.init_state()), make_inputs(STEPS[0], requests, pages))
    assert hidden.shape == (NUM_ROWS, program.plan.hidden_size)
    unembed = np.asarray(derived.params["unembed"])
    for row, part in enumerate(STEPS[0]):
        last = 0 if last_row else part.stop - part.start - 1
        np.testing.assert_allclose(hidden[row] @ unembed, logits[row, last], atol=1e-5)


@pytest.mark.parametrize(
    ("module", "config", "hidden_size"),
    [
        (GPT2, GPT2_CONFIG, 16),
        (Gemma, GEMMA, 16),  # capped logits
    ],
)
def test_hidden_is_found_behind_tied_heads_and_caps(module: Any, config: Any, hidden_size: int):
    forward, params = as_forward(make_filled_model(module, config), None)
    captured = capture(forward, params, 24)
    plan = derive(captured.graph, captured.times, captured.token_input)
    assert plan.hidden_size == hidden_size


def test_a_model_without_a_vocabulary_projection_has_no_hidden():
    def count_tokens(params: Any, tokens: Any) -> Any:
        return jnp.cumsum(jax.nn.one_hot(tokens, 31), axis=1) * params

    captured = capture(count_tokens, jnp.ones(31), 24)
    plan = derive(captured.graph, captured.times, captured.token_input)
    program = make_program(captured.graph, plan, num_slots=4, unroll=True)
    inputs = make_inputs([Part(0, 0, 3)], make_requests(31), np.zeros((1, 1), np.int32))
    _, hidden, _ = jax.eval_shape(
        lambda s: program.logits([jnp.ones(31)], s, inputs, last_row=True), program.init_state()
    )
    assert plan.hidden_size == 0 and hidden.shape == (NUM_ROWS, 0)
