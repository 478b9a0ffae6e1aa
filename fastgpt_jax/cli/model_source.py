"""What `--model`, `--params` and `--tokenizer` name: a model folder or file, a hub's id, or a user's own function.

Knows no compiler. The one idea: whatever can go wrong in somebody else's file becomes one line that says where.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from fastgpt_jax.checkpoint import HubSettings, LoadedModel, load_model, parse_model_id
from fastgpt_jax.cli.params_file import replace_params
from fastgpt_jax.errors import UserError
from fastgpt_jax.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model as `fastgpt_jax.compile` takes it: `compile(source.model, source.params, tokenizer=source.tokenizer)`.

    Attributes:
      model: A `LoadedModel`, or the user's function or module.
      params: The user's parameters; None for a loaded model.
      tokenizer: The one `--tokenizer` or `make_model` gave; a loaded model brings its own.
      max_model_len: The longest sequence the model was made for, in tokens, where that is known.
    """

    model: Any
    params: Any = None
    tokenizer: Any = None
    max_model_len: int | None = None


def load_source(
    model: str,
    params: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
) -> ModelSource:
    """Loads what the flags name, weights included; every mistake is a UserError of one line."""
    if not is_function_spec(model):
        return _load_folder(model, params, tokenizer, dtype, max_model_len)
    if dtype != "auto":
        raise UserError("--dtype is for model folders; a function of your own decides its dtypes itself")
    made = call_make_model(find_make_model(model), model)
    if params is not None:
        made = dataclasses.replace(made, params=replace_params(made.params, params))
    return made if tokenizer is None else dataclasses.replace(made, tokenizer=_read_tokenizer(tokenizer))


def trace_source(model: str) -> ModelSource:
    """Like `load_source` for a function of the user's, with shapes in place of its parameters: no weight is made.

    Arrays that the function closes over (a table of rotations made in `make_model`) are tracers too, and have no
    values once this returns; nor may `make_model` itself ask for values. `needs_values` tells such a failure, and
    `load_source` is what remains.
    """
    made: list[ModelSource] = []
    graphs: list[Any] = []
    make_model = find_make_model(model)

    def make_params() -> Any:
        source = call_make_model(make_model, model)
        made.append(source)
        if not isinstance(source.model, nnx.Module):
            return source.params
        graph, state = nnx.split(source.model)
        graphs.append(graph)
        return state

    params = jax.eval_shape(make_params)
    if graphs:
        return dataclasses.replace(made[0], model=nnx.merge(graphs[0], params))
    return dataclasses.replace(made[0], params=params)


def needs_values(error: BaseException) -> bool:
    """Whether an error of tracing says that a value was asked for where there are shapes alone."""
    kinds = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
    kinds = (*kinds, jax.errors.TracerIntegerConversionError, jax.errors.UnexpectedTracerError)
    kinds = (*kinds, NotImplementedError)  # our reader, on meeting a constant that is a tracer
    return isinstance(error, kinds) or (isinstance(error, UserError) and isinstance(error.__cause__, kinds))


def is_function_spec(model: str) -> bool:
    """Whether this is `module_or_file.py:make_model`, rather than a folder, a file or a hub's id."""
    return ":" in model and not Path(model).exists() and parse_model_id(model) is None


def hub_settings(environment: Mapping[str, str]) -> HubSettings:
    """Where ids are looked up, by the variables that ModelScope's and Hugging Face's own tools read."""
    cache, domain = environment.get("MODELSCOPE_CACHE"), environment.get("MODELSCOPE_DOMAIN")
    settings = HubSettings(
        modelscope_cache=Path(cache) if cache else None,
        is_offline=environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"),
    )
    if not domain:
        return settings
    endpoint = domain if "://" in domain else f"https://{domain}"
    return dataclasses.replace(settings, modelscope_endpoint=endpoint)


def find_make_model(spec: str) -> Callable[[], Any]:
    """Imports the module or file before the last colon; returns the function named after it."""
    place, _, name = spec.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        kind = "no" if function is None else f"{type(function).__name__}, not a function,"
        raise UserError(f"{place} has {kind} {name!r}; --model takes FILE.py:FUNCTION or MODULE:FUNCTION")
    return function


def call_make_model(make_model: Callable[[], Any], spec: str) -> ModelSource:
    """Calls a user's function; raises UserError where it fails or returns something else."""
    expected = "it must return (fn, params) or (fn, params, tokenizer)"
    try:
        made = make_model()
    except (Exception, SystemExit) as error:
        raise UserError(f"{spec} failed with {_describe(error)}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise UserError(f"{spec} returned a {type(made).__name__}{size}; {expected}")
    fn, params, tokenizer = made if len(made) == 3 else (*made, None)
    if not callable(fn) and not hasattr(fn, "apply"):
        raise UserError(f"{spec} returned a {type(fn).__name__} first, which cannot be called; {expected}")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _read_tokenizer(str(tokenizer))
    if tokenizer is not None and not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
        raise UserError(f"{spec} returned a {type(tokenizer).__name__} as tokenizer, which has no encode and decode")
    _check_leaves(params, spec)
    return ModelSource(fn, params, tokenizer)


def _check_leaves(params: Any, spec: str) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(
                f"{spec} returned parameters with a {type(leaf).__name__} at {name!r}; params holds arrays alone, "
                "leave the rest to the function"
            )


def _load_folder(
    model: str, params: str | None, tokenizer: str | None, dtype: str, max_model_len: int | None
) -> ModelSource:
    if params is not None:
        raise UserError("--params goes with --model FILE.py:FUNCTION; a model folder holds its own weights")
    if model.endswith(".py"):
        raise UserError(f"say which function of {model} makes the model, as in --model {model}:make_model")
    loaded: LoadedModel = load_model(
        model, dtype=None if dtype == "auto" else dtype, max_model_len=max_model_len, hub=hub_settings(os.environ)
    )
    if tokenizer is not None:
        loaded = dataclasses.replace(loaded, tokenizer=_read_tokenizer(tokenizer))
    return ModelSource(loaded, tokenizer=loaded.tokenizer, max_model_len=loaded.generation.max_model_len)


def _read_tokenizer(folder: str) -> Any:
    if not Path(folder).is_dir():
        raise UserError(f"no such tokenizer folder: {folder}")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"there is no tokenizer in {folder}; it needs tokenizer.json, or vocab.json and merges.txt")
    return tokenizer


def _import_file(path: Path) -> ModuleType:
    """Runs a file as Python would run a script: its own folder comes first on the path."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    _prepend_path(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends in sys.exit, unguarded, would end the tool
        raise UserError(f"{path} cannot be imported: {_describe(error)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    _prepend_path(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"module {name!r} cannot be imported: {_describe(error)}") from error


def _prepend_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _describe(error: BaseException) -> str:
    """Returns an exception's type and text with the file and line it came from, in one line."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    if isinstance(error, SyntaxError) or not own:
        return text
    # The deepest frame outside installed packages is the user's own line.
    users = [frame for frame in own if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    frame = (users or own)[-1]
    return f"{text} ({frame.filename}:{frame.lineno})"
