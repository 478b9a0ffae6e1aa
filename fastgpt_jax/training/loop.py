"""The training loop of any causal language model given as `logits = fn(params, tokens)`.

Knows no architecture, no text and no file: batches come from a function of the step, checkpoints and log lines go out
through callbacks. The one idea: a run is a pure function of (params, batches, optimizer), one jitted and donated step
at a time, so that stopping and resuming changes nothing.

A window of W = T + 1 tokens is T inputs and the T targets that follow each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Forward = Callable[[Any, Int[Array, "B T"]], Float[Array, "B T V"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds: a pytree of arrays (or of what describes them, such as `jax.ShapeDtypeStruct`).

    Invariant: `step` updates (a scalar) have been applied to `params`, whose floating leaves are float32 masters.
    """

    step: Any
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """A line of the log; losses are in nats a token."""

    step: int
    loss: float
    grad_norm: float


def init_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Starts a run: floating parameters become float32 masters, the optimizer's moments are zero.

    The parameters are copied, because the step donates its state.
    """

    def master(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        return jnp.array(leaf, jnp.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype, copy=True)

    params = jax.tree.map(master, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def next_token_loss(fn: Forward, params: Any, windows: Int[Array, "B W"]) -> Float[Array, ""]:
    """Mean cross entropy of each window's next tokens, in nats; the softmax is float32 whatever the logits are."""
    logits = fn(params, windows[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def make_train_step(
    fn: Forward, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Int[Array, "B W"]], tuple[TrainState, Float[Array, " 2"]]]:
    """Jits one update; the state is donated. Returns also (loss, gradient norm before clipping)."""

    def train_step(state: TrainState, windows: Int[Array, "B W"]) -> tuple[TrainState, Float[Array, " 2"]]:
        loss, grads = jax.value_and_grad(lambda params: next_token_loss(fn, params, windows))(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), jnp.stack([loss, optax.tree.norm(grads)])

    return jax.jit(train_step, donate_argnums=0)


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, Any]],
    batch_fn: Callable[[int], np.ndarray],
    *,
    steps: int,
    log_every_steps: int = 20,
    on_record: Callable[[StepRecord], None] = lambda record: None,
    on_step: Callable[[int, TrainState], None] = lambda step, state: None,
) -> TrainState:
    """Runs from `state.step` to `steps`.

    Args:
      batch_fn: Step (counted from 0) to windows [B, W].
      on_record: Called every `log_every_steps` and after the last step with the mean over the steps since then.
      on_step: Called after every step with the number of steps done; it must not keep the state, which is donated next.

    Returns: The final state. The state handed in must not be used again.
    """
    pending: list[Any] = []
    for step in range(int(state.step), steps):
        state, measured = train_step(state, batch_fn(step))
        pending.append(measured)
        done = step + 1
        if done % log_every_steps == 0 or done == steps:
            loss, grad_norm = np.mean([np.asarray(entry) for entry in pending], axis=0)
            on_record(StepRecord(done, float(loss), float(grad_norm)))
            pending.clear()
        on_step(done, state)
    return state


def make_evaluator(fn: Forward, batch_size: int) -> Callable[[Any, np.ndarray], float]:
    """Makes `evaluate(params, windows) -> mean loss in nats a token`, exact over every window.

    The last batch is filled up with copies of the last window that weigh nothing, so that one shape is compiled.
    """

    @jax.jit
    def losses(params: Any, windows: Int[Array, "B W"]) -> Float[Array, " B"]:
        logits = fn(params, windows[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(axis=-1)

    def evaluate(params: Any, windows: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            padded = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
            total += float(np.asarray(losses(params, padded))[: len(batch)].sum(dtype=np.float64))
        return total / len(windows)

    return evaluate
