"""From a text file to a Hugging Face folder: tokenizer, data, Llama, training, evaluation, export.

Knows no flags. The one idea: `output` holds everything of a run (`checkpoints/`, `metrics.jsonl`, `loss.png`, and the
servable folder `model/`), and everything but the checkpoints is a function of the text and the settings, so that a run
can be stopped, resumed and repeated.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from fastgpt_jax.checkpoint.export import export_model
from fastgpt_jax.errors import UserError
from fastgpt_jax.models.llama import Llama, LlamaConfig
from fastgpt_jax.training import data
from fastgpt_jax.training.checkpoints import Checkpoints
from fastgpt_jax.training.loop import (
    Forward,
    StepRecord,
    TrainState,
    init_train_state,
    make_evaluator,
    make_train_step,
    train,
)
from fastgpt_jax.training.loss_curve import save_loss_curve
from fastgpt_jax.training.metrics import MetricsLog
from fastgpt_jax.training.optimizer import make_optimizer
from fastgpt_jax.training.settings import ModelSettings, TrainSettings
from fastgpt_jax.training.tokenizer_training import END_OF_TEXT_ID, save_tokenizer, train_bpe

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run measured. Losses are in nats a token over the whole validation part."""

    folder: Path
    num_parameters: int
    train_loss: float
    valid_loss: float
    valid_bits_per_byte: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text made ready: its tokenizer, the two token streams, and the bytes of the validation text."""

    tokenizer: Tokenizer
    train_stream: np.ndarray
    valid_stream: np.ndarray
    num_valid_bytes: int


def prepare_corpus(text: str, settings: TrainSettings) -> Corpus:
    """Splits the text, learns the tokenizer on the training part alone, and encodes both parts."""
    train_text, valid_text = data.split_text(text, settings.data.valid_fraction)
    tokenizer = train_bpe(train_text, settings.tokenizer.vocab_size)
    train_documents, valid_documents = (
        data.documents(part, settings.data.paragraphs_per_document) for part in (train_text, valid_text)
    )
    return Corpus(
        tokenizer,
        data.encode_documents(tokenizer, train_documents, END_OF_TEXT_ID),
        data.encode_documents(tokenizer, valid_documents, END_OF_TEXT_ID),
        sum(len(document.encode()) for document in valid_documents),
    )


def make_llama(settings: ModelSettings, vocab_size: int, seed: int) -> Llama:
    """Makes an untrained float32 Llama with a tied head."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        rope_scaling=None,
        attention_bias=False,
        dtype="float32",
        **dataclasses.asdict(settings),
    )
    return Llama(config, rngs=nnx.Rngs(seed))


def train_from_text(text: str, settings: TrainSettings, output: Path, *, resume: bool = False) -> TrainResult:
    """Trains on `text` and writes `output/model/` in the Hugging Face layout (bfloat16).

    Args:
      output: The folder of the run; made if missing.
      resume: Continue from the newest checkpoint in it, with the optimizer's state.

    Raises:
      UserError: The text is too short, or `output` already holds a run and `resume` is False, or the reverse.
    """
    started = time.monotonic()
    corpus = prepare_corpus(text, settings)
    model = make_llama(settings.model, corpus.tokenizer.get_vocab_size(), settings.seed)
    graph, params = nnx.split(model)

    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens)

    _make_folder(output)
    log = MetricsLog(output / "metrics.jsonl")
    with Checkpoints(output / "checkpoints") as checkpoints:
        state = _run(fn, params, corpus, settings, checkpoints, log, resume=resume)
    valid_windows = data.all_windows(corpus.valid_stream, settings.data.window_tokens)
    valid_loss = make_evaluator(fn, settings.data.batch_size)(state.params, valid_windows)
    nnx.update(model, state.params)
    _write_model(model, corpus.tokenizer, output / "model")
    _draw(output / "loss.png", log, settings.name)
    bits_per_token = valid_loss / np.log(2.0)
    return TrainResult(
        folder=output / "model",
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        train_loss=log.curve("loss")[-1][1],
        valid_loss=valid_loss,
        valid_bits_per_byte=float(bits_per_token * len(corpus.valid_stream) / corpus.num_valid_bytes),
        seconds=time.monotonic() - started,
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --output") from error


def _run(
    fn: Forward,
    params: Any,
    corpus: Corpus,
    settings: TrainSettings,
    checkpoints: Checkpoints,
    log: MetricsLog,
    *,
    resume: bool,
) -> TrainState:
    """Trains from the start or from the newest checkpoint, logging and saving as the settings say."""
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    state = init_train_state(params, optimizer)
    if resume:
        state = checkpoints.restore(state)
    elif checkpoints.latest_step is not None:
        raise UserError(
            f"{checkpoints.folder} already holds a run (step {checkpoints.latest_step}); "
            "continue it with --resume or choose another --output"
        )
    log.truncate_after(int(state.step))
    valid_windows = data.all_windows(corpus.valid_stream, settings.data.window_tokens)
    evaluate = make_evaluator(fn, settings.data.batch_size)

    def on_record(record: StepRecord) -> None:
        log.append(step=record.step, loss=record.loss, grad_norm=record.grad_norm)
        _log.info("step %d of %d: loss %.3f", record.step, settings.steps, record.loss)

    def on_step(step: int, state: TrainState) -> None:
        is_last = step == settings.steps
        if step % settings.evaluate_every_steps == 0 or is_last:
            valid_loss = evaluate(state.params, valid_windows)
            log.append(step=step, valid_loss=valid_loss)
            _log.info("step %d of %d: validation loss %.3f", step, settings.steps, valid_loss)
        if step % settings.checkpoint_every_steps == 0 or is_last:
            checkpoints.save(state)

    return train(
        state,
        make_train_step(fn, optimizer),
        lambda step: data.random_windows(
            corpus.train_stream,
            settings.data.batch_size,
            settings.data.window_tokens,
            seed=settings.seed,
            step=step,
        ),
        steps=settings.steps,
        log_every_steps=settings.log_every_steps,
        on_record=on_record,
        on_step=on_step,
    )


def _draw(path: Path, log: MetricsLog, title: str) -> None:
    """Draws the loss curve where matplotlib is installed; the numbers are in the log either way."""
    if importlib.util.find_spec("matplotlib") is None:
        _log.warning("no %s: the picture needs matplotlib (extra `train`)", path.name)
        return
    save_loss_curve(path, log.curve("loss"), log.curve("valid_loss"), title=title)


def _write_model(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what a server needs: bfloat16 weights, config.json, generation_config.json and the tokenizer."""
    export_model(
        model, model.config, folder, dtype="bfloat16", eos_token_ids=(END_OF_TEXT_ID,), bos_token_id=END_OF_TEXT_ID
    )
    save_tokenizer(tokenizer, folder, max_model_len=model.config.max_position_embeddings)
