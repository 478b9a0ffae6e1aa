"""`fastgpt demo`: the whole idea on the embedded model, within a minute and with no download.

It explains what the compiler finds in a plain training forward, compiles it, streams a scene, measures tokens a second
beside recomputing the full forward for every token, in the same process, and writes the X-ray of the compiled step. The
scene goes to standard output, all else to standard error.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from absl import flags
from flax import nnx

from fastgpt_jax.checkpoint import LoadedModel, load_model
from fastgpt_jax.cli.common import run, to_options
from fastgpt_jax.cli.recompute import Recompute
from fastgpt_jax.cli.xray_html import render_html
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.explain import explain
from fastgpt_jax.compiler.roofline import MACHINES
from fastgpt_jax.compiler.xray import xray
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.engine.prompts import encode_prompt
from fastgpt_jax.sampling.params import SamplingParams


def make_flags() -> flags.FlagValues:
    """Returns the tool's flags, not parsed."""
    values = flags.FlagValues()
    flags.DEFINE_string("prompt", "ROMEO:\n", "How the scene begins.", flag_values=values)
    flags.DEFINE_integer("max_tokens", 300, "Most tokens of the scene.", flag_values=values)
    flags.DEFINE_float("temperature", 0.6, "0 writes the most likely scene.", flag_values=values)
    flags.DEFINE_float("top_p", 0.95, "Sample from the most likely tokens of this mass.", flag_values=values)
    flags.DEFINE_integer("seed", 6, "Another seed, another scene.", flag_values=values)
    return values


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, parsed."""

    prompt: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """The same tokens written greedily with the derived cache and by full forwards; compilation is not in the seconds.

    `num_equal` tokens from the first on are the same in both.
    """

    num_tokens: int
    served_s: float
    recomputed_s: float
    num_equal: int

    @property
    def ratio(self) -> float:
        """How many times as fast the served model is."""
        return self.recomputed_s / self.served_s


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "demo",
        make_flags(),
        lambda values: execute(to_options(values, Options)),
        argv,
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(options: Options) -> int:
    """Explains, compiles, streams and measures."""
    params = SamplingParams(**{name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens", "seed")})
    loaded = load_model(demo_folder(), dtype="float32")
    encode_prompt(options.prompt, loaded.tokenizer)  # a mistake is told before the work begins
    config = CompileConfig(max_model_len=loaded.generation.max_model_len, max_num_seqs=1)
    _title("The model, a plain training forward: fastgpt_jax/models/llama.py")
    _say(str(explain(loaded, config=config)))
    _title("Compiling it")
    started = time.monotonic()
    llm = LLM(compile_model(loaded, config=config))
    _say(f"traced, derived and certified in {time.monotonic() - started:.1f} s")
    llm.llm_engine.check_request(options.prompt, params)
    _title(f"A scene that begins with {options.prompt!r}")
    stream_scene(llm, options.prompt, params)
    _title("Speed, one request, greedy, until the context is full")
    speed = measure_speed(llm, loaded, options.prompt)
    _say(f"served with the derived cache    {speed.num_tokens / speed.served_s:8.0f} tokens/s")
    _say(f"the full forward for every token {speed.num_tokens / speed.recomputed_s:8.0f} tokens/s")
    _say(f"ratio {speed.ratio:.1f}; {speed.num_equal} of {speed.num_tokens} tokens equal")
    _title("Inside the compiled step: open this page")
    _say(str(write_xray(loaded, config)))
    return 0


def write_xray(loaded: LoadedModel, config: CompileConfig) -> Path:
    """Writes the X-ray of a model as a page into a folder of its own; returns the file."""
    found = xray(loaded, config=config, name="the demo model", machine=MACHINES["cpu"])
    page = Path(tempfile.mkdtemp(prefix="fastgpt-demo-")) / "xray.html"
    page.write_text(render_html(found, found.stages[-1].name), encoding="utf-8")
    return page


def demo_folder() -> Path:
    """Where the embedded model lies."""
    return Path(str(resources.files("fastgpt_jax") / "assets" / "demo"))


def stream_scene(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Prints a prompt and its continuation as it is written."""
    print(prompt, end="", flush=True)
    num_shown = 0
    for _, output in llm.stream(prompt, params):
        text = output.outputs[0].text
        print(text[num_shown:], end="", flush=True)
        num_shown = len(text)
    print(flush=True)


def measure_speed(llm: LLM, loaded: LoadedModel, prompt: str) -> Speed:
    """Continues `prompt` greedily until the context is full, with the derived cache and by full forwards."""
    max_model_len = loaded.generation.max_model_len
    prompt_ids = llm.get_tokenizer().encode(prompt)
    num_tokens = max_model_len - len(prompt_ids)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    graph, state = nnx.split(loaded.model)
    baseline = Recompute(lambda state, tokens: nnx.merge(graph, state)(tokens), state, max_model_len=max_model_len)

    def serve() -> tuple[int, ...]:
        outputs = llm.generate(prompt_token_ids=[prompt_ids], sampling_params=params, use_tqdm=False)
        return outputs[0].outputs[0].token_ids

    serve()  # what this needs compiled is compiled before the clock starts
    started = time.monotonic()
    served = serve()
    served_s = time.monotonic() - started
    started = time.monotonic()
    recomputed = baseline.generate(prompt_ids, num_tokens)
    recomputed_s = time.monotonic() - started
    pairs = enumerate(zip(served, recomputed, strict=True))
    num_equal = next((index for index, (mine, theirs) in pairs if mine != theirs), num_tokens)
    return Speed(num_tokens, served_s, recomputed_s, num_equal)


def _title(text: str) -> None:
    _say(f"\n--- {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
