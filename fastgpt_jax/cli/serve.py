"""`fastgpt serve`: an OpenAI-compatible server for a model.

    fastgpt serve --model ARTIFACT --port 8000
    fastgpt serve --model FOLDER --max_num_seqs 32 --api_key_file keys.txt
    fastgpt-server --config fastgpt_config.yaml --model FOLDER --log-level debug

The address goes to standard output as soon as the port answers, log lines to standard error; /health/ready says when
the model is there. What is no artifact is compiled into a cache folder first, so that nothing is compiled while it
serves. SIGTERM lets requests finish and ends with 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from fastapi import FastAPI
from starlette.middleware import Middleware

from fastgpt_jax.artifact.loading import ServedArtifact, is_artifact
from fastgpt_jax.artifact.manifest import read_manifest
from fastgpt_jax.cli.common import run
from fastgpt_jax.cli.devices import count_mesh_devices, make_virtual_devices
from fastgpt_jax.cli.serve_artifact import find_or_compile
from fastgpt_jax.cli.serve_config import read_serve_config
from fastgpt_jax.cli.serve_flags import (
    ModelOptions,
    apply_config,
    flag_values,
    make_flags,
    make_model_options,
    make_settings,
)
from fastgpt_jax.engine.args import make_engine_args
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.app import make_app
from fastgpt_jax.serving.async_llm import AsyncLLM
from fastgpt_jax.serving.auth import Keys
from fastgpt_jax.serving.lifecycle import Served, run_server
from fastgpt_jax.serving.logs import configure_logging
from fastgpt_jax.serving.metrics import ServerMetrics
from fastgpt_jax.serving.prewarm import prewarm
from fastgpt_jax.serving.result_cache import CacheResults, ResultCache
from fastgpt_jax.serving.settings import ServerSettings
from fastgpt_jax.tokenizer.chat_template import ChatTemplate

_log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit code."""
    return run(
        "serve",
        make_flags(),
        execute,
        argv,
        positional="model",
        description=(__doc__ or "").partition("\n\n")[0],
    )


def execute(values: flags.FlagValues) -> int:
    """Serves until a signal; what is wrong with the flags is told before the port is taken."""
    config = flag_values(values)["config"]
    if config is not None:
        apply_config(values, read_serve_config(config))
    options = make_model_options(values)
    if is_artifact(options.model) and options.compiling:
        raise UserError(
            f"--{', --'.join(options.compiling)} are for models that are no artifacts; {options.model} is what it was "
            "compiled to be"
        )
    settings = make_settings(values, _model_name(options.model))
    configure_logging(settings.log_format, settings.log_level)
    return asyncio.run(run_server(settings, lambda: load(options, settings), _announce))


def load(options: ModelOptions, settings: ServerSettings) -> Served:
    """Makes an engine of what the flags name, with nothing left to compile, and the application before it."""
    with _as_log_lines():
        _choose_devices(options)
        engine_options = {**options.compiled, **options.engine}
        folder = Path(options.model)
        if not is_artifact(folder):
            folder = find_or_compile(options.model, _compile_options(options), options.cache_folder)
            engine_options = dict(options.engine)
        engine = LLMEngine.from_engine_args(
            make_engine_args(str(folder), engine_options), grammar_timeout_s=settings.grammar_timeout_s
        )
        if isinstance(engine.compiled, ServedArtifact):
            _load_all(engine.compiled)
        if options.prewarm is not None:
            _prewarm(engine, options.prewarm, settings)
    llm = AsyncLLM(
        engine,
        max_queue_len=settings.max_queue_len,
        max_queued_tokens=settings.max_queued_tokens,
        model_name=settings.model_name,
        num_tokenisers=options.num_workers,
    )
    counted = ServerMetrics(llm)
    app = make_app(llm, settings, counted=counted)
    if settings.result_cache_ttl_s > 0:
        _keep_results(app, llm, settings, counted)
    return Served(llm, app)


def _compile_options(options: ModelOptions) -> dict[str, Any]:
    """Flags of `fastgpt compile`; what the engine is to run together decides where nothing else does."""
    engine = options.engine
    decided = {"max_num_seqs": engine.get("max_batch"), "gpu_memory_utilization": engine.get("gpu_memory_utilization")}
    return {**decided, **options.compiled, **options.compiling}


def _load_all(artifact: ServedArtifact) -> None:
    """Makes every program callable before the first request comes."""
    started_s = time.monotonic()
    artifact.steps.load_all()
    artifact.seconds["executables"] += time.monotonic() - started_s


def _prewarm(engine: LLMEngine, log: Path, settings: ServerSettings) -> None:
    """Each tenant has a part of the prefix cache, and each finds its prompts there."""
    source = getattr(engine.compiled, "chat_template", None)
    names = {name: getattr(engine.tokenizer, name, None) for name in ("bos_token", "eos_token")}
    template = None if source is None else ChatTemplate(source, **names)
    tenants = Keys(settings.api_keys).tenants
    salts = [f"{tenant}/" for tenant in tenants] if len(tenants) > 1 else [""]
    done = prewarm(engine, log, template=template, salts=salts)
    _log.info("prewarmed", extra={**dataclasses.asdict(done), "num_tenants": len(salts)})


def _keep_results(app: FastAPI, llm: AsyncLLM, settings: ServerSettings, counted: ServerMetrics) -> None:
    """Puts the result cache behind the check of keys."""
    cache = ResultCache(ttl_s=settings.result_cache_ttl_s, max_bytes=settings.result_cache_bytes)
    counted.add(cache)
    digest = llm.compiled.manifest.model.digest
    app.user_middleware.append(
        Middleware(CacheResults, cache=cache, settings=settings, model_digest=digest, watched=llm)
    )


def _choose_devices(options: ModelOptions) -> None:
    """Must come before JAX starts."""
    if options.gpu_id is not None:
        jax.config.update("jax_cuda_visible_devices", options.gpu_id)
        if jax.default_backend() != "gpu":
            raise UserError(
                f"gpu_id={options.gpu_id} asks for a GPU, and JAX runs on {jax.default_backend()} here; leave it out, "
                "or install a JAX for GPUs"
            )
    size = options.compiled.get("tensor_parallel_size", 1)
    make_virtual_devices(count_mesh_devices(options.model) if is_artifact(options.model) else size)


def _model_name(model: str) -> str:
    """What the model is called where nobody says."""
    if is_artifact(model):
        return read_manifest(Path(model)).model.name
    return Path(model.rpartition("@")[0] or model).name


def _announce(url: str) -> None:
    print(f"listening on {url}", flush=True)


@contextlib.contextmanager
def _as_log_lines() -> Iterator[None]:
    """Makes log lines of what libraries print."""
    with contextlib.redirect_stdout(_LogLines()), contextlib.redirect_stderr(_LogLines()):
        yield


class _LogLines(io.TextIOBase):
    """Logs every line written to it."""

    def __init__(self):
        self._rest = ""

    def write(self, text: str, /) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                _log.info("%s", line.strip())
        return len(text)
