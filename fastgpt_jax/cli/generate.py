"""`fastgpt generate`: continues prompts with an artifact, a model folder or a function of your own.

    fastgpt generate --model ARTIFACT --prompt "Once upon a time"
    fastgpt generate --model FOLDER --prompt "Once upon a time" --max_tokens 100 --temperature 0
    fastgpt generate --model my_model.py:make_model --prompt_ids 1,2,3

Text (token ids for models without a tokenizer) goes to standard output, one prompt after another; all else to standard
error. An artifact is served as it is: neither the compiler nor any model library is imported.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fastgpt_jax.artifact.loading import ON_MISMATCH, is_artifact
from fastgpt_jax.artifact.verify import LEVELS
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.devices import count_mesh_devices, make_virtual_devices
from fastgpt_jax.cli.exit_codes import EXIT_USER_ERROR
from fastgpt_jax.cli.quantization_flags import add_quantization_flags, read_quantization_rules
from fastgpt_jax.cli.tables import format_seconds
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.engine.outputs import CompletionOutput, RequestOutput
from fastgpt_jax.engine.prompts import encode_prompt
from fastgpt_jax.errors import UserError
from fastgpt_jax.sampling.params import SamplingParams


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    text, integer, number = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text(
        "model",
        None,
        "Artifact or model folder, or FILE.py:FUNCTION, MODULE:FUNCTION.",
        required=True,
        flag_values=values,
    )
    text("params", None, "safetensors file or Orbax folder for FUNCTION's parameters.", flag_values=values)
    text("tokenizer", None, "Folder of a tokenizer.", flag_values=values)
    text("dtype", "auto", "Of a model folder: auto, float32, bfloat16 or float16.", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.", flag_values=values)
    flags.DEFINE_multi_string("prompt_ids", [], "Token ids, as in 1,2,3; may be repeated.", flag_values=values)
    text("prompts_file", None, "File with a prompt a line.", flag_values=values)
    integer("max_tokens", 128, "Most tokens to generate for a prompt.", flag_values=values)
    number("temperature", 1.0, "0 takes the most likely token.", flag_values=values)
    number("top_p", 1.0, "Sample from the most likely tokens of this mass.", flag_values=values)
    integer("top_k", 0, "Sample from this many most likely tokens; 0 is all.", flag_values=values)
    number("min_p", 0.0, "Leave out tokens less likely than this times the most likely.", flag_values=values)
    number("repetition_penalty", 1.0, "Divides the logits of tokens seen before.", flag_values=values)
    integer("seed", 0, "Another seed, another text.", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "String that ends a text; may be repeated.", flag_values=values)
    flags.DEFINE_bool("ignore_eos", False, "Continue past the end-of-sequence token.", flag_values=values)
    integer("max_model_len", None, "Tokens of prompt and output together.", flag_values=values)
    integer("max_num_seqs", None, "Prompts that run together.", flag_values=values)
    integer("tensor_parallel_size", None, "Devices that share every layer.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("stream", False, "Print text as it is made.", flag_values=values)
    add_quantization_flags(values)
    flags.DEFINE_enum(
        "verify",
        None,
        LEVELS,
        "Of an artifact, what is checked first: full, fast (not the weights) or auto.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "on_mismatch",
        None,
        ON_MISMATCH,
        "With an artifact of another environment: recompile or refuse.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "fingerprint",
        None,
        "Check that an artifact computes what it did when it was compiled (default: yes).",
        flag_values=values,
    )
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    model: str
    params: str | None
    tokenizer: str | None
    dtype: str
    prompt: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    prompts_file: str | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool
    max_model_len: int | None
    max_num_seqs: int | None
    tensor_parallel_size: int | None
    quantization: str | None
    kv_cache_dtype: str
    quantization_rules: str | None
    sparse: str | None
    strict: bool
    stream: bool
    verify: str | None
    on_mismatch: str | None
    fingerprint: bool | None


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "generate",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Generates; a prompt that cannot be served is a line on standard error, and the others are served all the same."""
    params = _sampling_params(options)
    given = _prompts(options)
    if is_artifact(options.model):
        llm = _load_artifact(options)
        encoded = _encode(given, llm.get_tokenizer())
    else:
        llm, encoded = _compile(options, given)
    servable = _servable(llm, encoded, params)
    if not servable:
        return EXIT_USER_ERROR
    started, num_tokens = time.monotonic(), 0
    for output in _in_order(llm, servable, params, options.stream):
        num_tokens += len(output.outputs[0].token_ids)
    elapsed_s = time.monotonic() - started
    told = "" if is_artifact(options.model) else ", compilation of steps included"
    print(f"{num_tokens} tokens in {elapsed_s:.2f} s{told}", file=sys.stderr)
    return EXIT_USER_ERROR if len(servable) < len(given) else 0


def _sampling_params(options: Options) -> SamplingParams:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos")
    return SamplingParams(**{name: getattr(options, name) for name in names})


def _prompts(options: Options) -> list[Any]:
    """Returns all prompts that the flags give, as text or ids."""
    prompts: list[Any] = [*options.prompt, *map(_parse_ids, options.prompt_ids)]
    if options.prompts_file is not None:
        try:
            # Lines end as files end them; other separators of Unicode are text. A byte-order mark is none.
            text = Path(options.prompts_file).read_text("utf-8-sig")
            prompts += text.removesuffix("\n").split("\n") if text else []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompts_file {options.prompts_file}: {error}") from error
    if not prompts:
        raise UserError("there is no prompt; give --prompt TEXT, --prompt_ids 1,2,3 or --prompts_file FILE")
    return prompts


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--prompt_ids must be whole numbers with commas, as in 1,2,3, got {text!r}") from None


def _encode(prompts: Sequence[Any], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Returns the prompts as ids, by what to call them; those without are named, and an error if there is no other."""
    encoded, errors = {}, {}
    for index, prompt in enumerate(prompts):
        name = f"prompt {index + 1}: " if len(prompts) > 1 else ""
        try:
            text, token_ids = encode_prompt(prompt, tokenizer)
            encoded[name] = {"prompt": text, "prompt_token_ids": token_ids}
        except UserError as error:
            errors[name] = error
    if not encoded:
        raise next(iter(errors.values()))
    for name, error in errors.items():
        _name_refused(name, error)
    return encoded


def _load_artifact(options: Options) -> LLM:
    """Serves what was compiled; a flag that asks for something else is an error."""
    if options.params is not None:
        raise UserError(
            f"--params goes with --model FILE.py:FUNCTION; the artifact {options.model} holds its own weights"
        )
    asked = (options.quantization, options.quantization_rules, options.sparse, options.kv_cache_dtype)
    if asked != (None, None, None, "auto"):
        raise UserError(
            "quantization and sparse are for models that are no artifacts; an artifact is what it was compiled to be"
        )
    make_virtual_devices(count_mesh_devices(options.model))
    started = time.monotonic()
    llm = LLM(
        options.model,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        tensor_parallel_size=options.tensor_parallel_size,
        verify=options.verify or "auto",
        on_mismatch=options.on_mismatch or "recompile",
        check_fingerprint=options.fingerprint is not False,
    )
    print(f"loaded {options.model} in {format_seconds(time.monotonic() - started)}", file=sys.stderr)
    return llm


def _compile(options: Options, prompts: Sequence[Any]) -> tuple[LLM, dict[str, dict[str, Any]]]:
    """Loads and compiles what is no artifact, for the prompts at hand."""
    for name in ("verify", "on_mismatch", "fingerprint"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is for artifacts, and {options.model} is none; fastgpt compile makes one")
    # What is compiled already needs neither the compiler nor a model library.
    from fastgpt_jax.cli.compile_for_prompts import compile_for_prompts  # noqa: PLC0415
    from fastgpt_jax.cli.model_source import load_source  # noqa: PLC0415

    make_virtual_devices(options.tensor_parallel_size or 1)
    source = load_source(options.model, options.params, options.tokenizer, options.dtype, options.max_model_len)
    encoded = _encode(prompts, source.tokenizer)
    started = time.monotonic()
    longest = max(len(prompt["prompt_token_ids"]) for prompt in encoded.values())
    compiled = compile_for_prompts(
        source,
        num_prompts=len(encoded),
        num_tokens=longest + options.max_tokens,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        tensor_parallel_size=options.tensor_parallel_size or 1,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        quantization_rules=read_quantization_rules(options.quantization_rules),
        sparse=options.sparse,
        is_strict=options.strict,
    )
    print(f"compiled {options.model} in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return LLM(compiled), encoded


def _servable(llm: LLM, prompts: Mapping[str, dict[str, Any]], params: SamplingParams) -> list[dict[str, Any]]:
    """Returns the prompts that can be served; those that cannot are named."""
    servable = []
    for name, prompt in prompts.items():
        try:
            llm.llm_engine.check_request(prompt, params)
            servable.append(prompt)
        except UserError as error:
            _name_refused(name, error)
    return servable


def _name_refused(name: str, error: UserError) -> None:
    print(f"fastgpt generate: {name}{error}", file=sys.stderr)


def _in_order(
    llm: LLM, prompts: Sequence[dict[str, Any]], params: SamplingParams, is_streaming: bool
) -> Iterator[RequestOutput]:
    """Prints every prompt's continuation in the order of the prompts; yields it when it is printed whole.

    While the first is printed as it grows, the others run with it and wait for their turn.
    """
    newest: dict[int, RequestOutput] = {}
    current, num_shown = 0, 0
    for index, output in llm.stream(prompts, params):
        newest[index] = output
        while current in newest:
            text = _text(llm, newest[current].outputs[0])
            if is_streaming or newest[current].finished:
                print(text[num_shown:], end="", flush=True)
                num_shown = len(text)
            if not newest[current].finished:
                break
            print(flush=True)
            yield newest[current]
            current, num_shown = current + 1, 0


def _text(llm: LLM, completion: CompletionOutput) -> str:
    """Returns what is printed of a continuation: its text, or its ids where there is no tokenizer."""
    if llm.get_tokenizer() is None:
        return ",".join(map(str, completion.token_ids))
    return completion.text
