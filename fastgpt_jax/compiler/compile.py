"""From a training forward to a served model: capture, derive, certify, and entry points on first use."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import jax

from fastgpt_jax.artifact.cache_layout import CacheLayout, Reach
from fastgpt_jax.artifact.entry_points import Buckets, EntryPointKey, Variant
from fastgpt_jax.artifact.step import FlatStep, Step
from fastgpt_jax.artifact.transfers import MovesPages, make_transfers
from fastgpt_jax.checkpoint import LoadedModel
from fastgpt_jax.checkpoint.padding import pad_model
from fastgpt_jax.compiler.bucket_plan import BucketPlan, plan_buckets
from fastgpt_jax.compiler.cache_reach import cache_reach
from fastgpt_jax.compiler.capture import Captured, as_forward, capture
from fastgpt_jax.compiler.certify import Certificate, certify
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.distribution import Distribution, array_type, family_rules, make_distribution
from fastgpt_jax.compiler.entry_point import TracedEntryPoint, compile_entry_point, trace_entry_point
from fastgpt_jax.compiler.kernel_choice import target_notes
from fastgpt_jax.compiler.memory_plan import plan_pages
from fastgpt_jax.compiler.packing import PackedStore
from fastgpt_jax.compiler.program import Program, make_program
from fastgpt_jax.compiler.quantization import make_pipeline, tell_unused
from fastgpt_jax.compiler.sparsity import PASS as SPARSE_ATTENTION
from fastgpt_jax.compiler.sparsity import check_sparsity, read_sparsity, with_sparsity
from fastgpt_jax.errors import UserError
from fastgpt_jax.generation import GenerationDefaults
from fastgpt_jax.sampling.inputs import SamplerInputs
from fastgpt_jax.sampling.step_io import StepInputs, StepOutputs
from passes.incremental.derive import derive
from passes.incremental.row_format import ROW_FORMATS
from passes.manager import PassManager
from passes.select import Target


@dataclass(eq=False)
class Compiled(MovesPages):
    """A served model: its state and steps, for an engine.

    Invariants: the state given to `step` is donated and must not be used again; entry points are made once each, when
    they are first asked for.

    Attributes:
      max_model_len: Tokens a request may reach; the cache holds at least as many.
      certificate: What was checked, and how well it agreed.
      bucket_plan: Shapes of the steps that the scheduler may ask for, and the padding to expect of them.
      seconds: Time that tracing, deriving and certifying took.
      notes: Choices that were fixed on the way, such as what was padded.
      chat_template: Source of the Jinja template that came with a loaded model; None where there was none.
      num_attention_layers: As many as clauses about sparsity have been held against; None without any.
    """

    config: CompileConfig
    captured: Captured
    program: Program
    certificate: Certificate
    leaves: list[Any]
    distribution: Distribution
    max_model_len: int
    tokenizer: Any
    generation: GenerationDefaults
    bucket_plan: BucketPlan
    seconds: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    num_attention_layers: int | None = None
    steps: dict[EntryPointKey, Step] = field(default_factory=dict)
    transfers: dict[str, FlatStep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        target = Target(jax.default_backend(), self.distribution.num_devices)
        cut_of = self.distribution.cut_of if target.num_devices > 1 else None
        pipeline = make_pipeline(
            self.config.pipeline, self.config.quantization, self.config.quantization_rules, target, cut_of
        )
        self._pipeline = with_sparsity(pipeline, self.config.sparse, self.max_model_len, self.num_attention_layers)
        self.manager = PassManager(self._pipeline, self.config.pass_options)
        self.store = PackedStore(leaf_paths(self.captured.params), self.leaves, self.distribution.sharding())

    @property
    def max_num_seqs(self) -> int:
        return self.config.max_num_seqs

    @property
    def tensor_parallel_size(self) -> int:
        return self.config.tensor_parallel_size

    @property
    def max_logprobs(self) -> int:
        return min(self.config.max_logprobs, self.vocab_size)

    @property
    def buckets(self) -> Buckets:
        return self.bucket_plan.buckets

    @property
    def vocab_size(self) -> int:
        return self.captured.vocab_size

    @property
    def min_first_chunk(self) -> int:
        """Prompt tokens that the first chunk of a request must hold; above 1 for a prefix-LM."""
        return self.certificate.min_first_chunk

    @property
    def hidden_size(self) -> int:
        """Numbers of a row of `StepOutputs.hidden`; 0 where the model does not end in a vocabulary projection."""
        return self.program.plan.hidden_size

    @property
    def layout(self) -> CacheLayout:
        return self.program.layout()

    def cache_reaches(self) -> tuple[Reach | None, ...]:
        """For each cache of rows, those that matter to new tokens."""
        params = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.captured.graph.inputs[:-1]]
        return cache_reach(self.program, params, [p for p in self._pipeline if p.name == SPARSE_ATTENTION])

    def init_state(self) -> list[Any]:
        """Empty caches for `max_num_seqs` requests."""
        return self.distribution.init_state(self.program)

    def transfer(self, name: str) -> FlatStep:
        """A program that moves pages or carried values, compiled on first use."""
        if name not in self.transfers:
            state = [array_type(x) for x in self.distribution.state_shapes(self.program)]
            lowered = make_transfers(self.layout, state)[name].lower(self.distribution.sharding)
            self.transfers[name] = lowered.compile()
        return self.transfers[name]

    def trace(self, key: EntryPointKey) -> TracedEntryPoint:
        """One entry point after the passes, not compiled."""
        return trace_entry_point(
            key,
            self.program,
            self.store,
            self.manager,
            self.distribution,
            self.max_model_len,
            self.max_logprobs,
        )

    def step(
        self,
        state: list[Any],
        inputs: StepInputs,
        sampler: SamplerInputs | None,
        *,
        variant: Variant,
        score: bool = False,
    ) -> tuple[StepOutputs, list[Any]]:
        """Runs one step, compiling its entry point on first use.

        Args:
          sampler: None for the greedy variant, which reads nothing of it.
          variant: 'greedy' takes the most likely token; 'full' samples.
          score: Also give log-probabilities of `inputs.targets`.
        """
        key = EntryPointKey(len(inputs.tokens), len(inputs.num_new), variant, score)
        if key not in self.steps:
            self.steps[key] = compile_entry_point(self.trace(key)).bind(self.store)
        return self.steps[key](state, inputs, sampler)


def compile(
    model: Any,
    params: Any = None,
    config: CompileConfig = CompileConfig(),
    *,
    tokenizer: Any = None,
    generation: GenerationDefaults | None = None,
) -> Compiled:
    """Derives the serving engine of a causal language model from its training forward.

    Args:
      model: A function `fn(params, tokens [B, T]) -> logits [B, T, V]`, a Flax NNX or linen module, or a `LoadedModel`.
      params: The parameters of a function or linen module.
      tokenizer: Encodes and decodes text; without one, token ids are served.
      generation: End-of-text ids and the longest sequence; a `LoadedModel` brings its own.

    Raises:
      NotServable: the model has no exact cached step; names the operation and the source line.
      UserError: the model, its parameters or the configuration cannot be used.
    """
    notes, rules, chat_template = {}, config.sharding_rules, None
    if isinstance(model, LoadedModel):
        chat_template = model.chat_template
        tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        generation = generation if generation is not None else model.generation
        model, notes = _pad(model, config)
        rules = rules or family_rules(model.config)
        model = model.model
    max_model_len = _max_model_len(config, generation)
    distribution = make_distribution(config.tensor_parallel_size, rules)
    forward, params = as_forward(model, params, config.arguments)
    start = time.perf_counter()
    captured = capture(forward, params, max_model_len)
    traced = time.perf_counter()
    unused = tell_unused(captured.graph, leaf_paths(params), config.quantization_rules, is_strict=config.is_strict)
    if unused is not None:
        notes["quantization_rules"] = unused
    plan = derive(captured.graph, captured.times, captured.token_input)
    derived = time.perf_counter()
    unroll, num_attention_layers = unrolls_layers(config), None
    if config.sparse is not None:
        num_attention_layers, notes["sparse"] = check_sparsity(
            captured.graph, config.sparse, is_unrolled=unroll, is_strict=config.is_strict
        )
    exact = make_program(
        captured.graph,
        plan,
        num_slots=config.max_num_seqs,
        unroll=unroll,
        page_size=config.page_size,
        num_pages=config.num_pages,
        max_model_len=max_model_len,
    )
    program = dataclasses.replace(exact, row_format=ROW_FORMATS.get(config.kv_cache_dtype))
    distribution.state_specs(program)  # refuses before the work
    notes |= distribution.notes(leaf_paths(params))
    notes |= target_notes(Target(jax.default_backend(), distribution.num_devices))
    leaves = distribution.place_weights(leaf_paths(params), jax.tree.leaves(params))
    certificate = certify(captured, exact, leaves)
    if certificate.min_first_chunk > max_model_len:
        raise UserError(
            f"the first chunk needs {certificate.min_first_chunk} tokens and max_model_len is {max_model_len}"
        )
    compiled = Compiled(
        config,
        captured,
        program,
        certificate,
        leaves,
        distribution,
        max_model_len,
        tokenizer,
        generation or GenerationDefaults(max_model_len),
        plan_buckets(
            max_model_len,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            certificate.min_first_chunk,
            chunk_lens=config.prefill_buckets,
            decode_rows=config.decode_buckets,
            traffic=config.traffic,
        ),
        {"trace": traced - start, "derive": derived - traced, "certify": certificate.seconds},
        notes,
        chat_template=chat_template,
        num_attention_layers=num_attention_layers,
    )
    compiled.program = program = dataclasses.replace(program, reaches=compiled.cache_reaches())
    if any(reach is not None for reach in program.reaches):
        notes["windows"] = _tell_windows(program)
    if config.memory_pool_size is not None or config.gpu_memory_utilization is not None:
        compiled.program = dataclasses.replace(program, num_pages=plan_pages(compiled))
    return compiled


def _tell_windows(program: Program) -> str:
    """What becomes of the rows that windows leave behind."""
    reach, num_windowed = program.layout().reach, sum(reach is not None for reach in program.reaches)
    if reach is not None:
        return f"pages are given back {reach.window} tokens later"
    return f"{num_windowed} of {len(program.reaches)} caches see windows; the others need all pages, so all are kept"


def unrolls_layers(config: CompileConfig) -> bool:
    """Whether loops over layers are written out."""
    if config.unroll_layers is not None:
        return config.unroll_layers
    is_by_layer = config.sparse is not None and read_sparsity(config.sparse).is_by_layer
    return is_by_layer or jax.default_backend() == "cpu"


def _pad(loaded: LoadedModel, config: CompileConfig) -> tuple[LoadedModel, dict[str, str]]:
    size = config.tensor_parallel_size
    loaded, padding = pad_model(loaded, size)
    if not padding:
        return loaded, {}
    return loaded, {"padding": f"{', '.join(map(str, padding))} for tensor_parallel_size {size}"}


def leaf_paths(params: Any) -> list[str]:
    """The name of each leaf, such as `layers.0.attention.query.kernel`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def _max_model_len(config: CompileConfig, generation: GenerationDefaults | None) -> int:
    if config.max_model_len is not None:
        return config.max_model_len
    if generation is None:
        raise UserError("max_model_len is needed for a model that does not name its longest sequence")
    return generation.max_model_len
