"""The loop trains any `fn(params, tokens)`, and stopping it changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.training.checkpoints import Checkpoints
from fastgpt_jax.training.loop import init_train_state, make_evaluator, make_train_step, train
from fastgpt_jax.training.optimizer import make_optimizer
from fastgpt_jax.training.settings import OptimizerSettings

V, D, STEPS = 7, 8, 12
OPTIMIZER = make_optimizer(OptimizerSettings(learning_rate=0.05, warmup_steps=2), STEPS)


def bigram(params, tokens):
    return params["embed"][tokens] @ params["head"]


TRAIN_STEP = make_train_step(bigram, OPTIMIZER)


def init_params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return {"embed": jax.random.normal(keys[0], (V, D), dtype), "head": jax.random.normal(keys[1], (D, V), dtype)}


def batch_fn(step):
    starts = np.random.default_rng(step).integers(0, V, (4, 1))
    return ((starts + np.arange(9)) % V).astype(np.int32)  # the next token is always one more


def run(state, steps, **callbacks):
    return train(state, TRAIN_STEP, batch_fn, steps=steps, log_every_steps=5, **callbacks)


def test_the_loss_falls_and_is_recorded():
    records = []
    run(init_train_state(init_params(), OPTIMIZER), STEPS, on_record=records.append)
    assert [record.step for record in records] == [5, 10, 12]
    assert records[-1].loss < 0.5 * records[0].loss


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = run(init_train_state(init_params(), OPTIMIZER), STEPS)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run(init_train_state(init_params(), OPTIMIZER), 5))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 5
        resumed = run(checkpoints.restore(init_train_state(init_params(), OPTIMIZER)), STEPS)
    assert int(resumed.step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.opt_state), (resumed.params, resumed.opt_state))


def test_resuming_nothing_or_another_model_is_a_user_error(tmp_path):
    state = init_train_state(init_params(), OPTIMIZER)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="nothing to resume"):
            checkpoints.restore(state)
        checkpoints.save(state)
        wider = init_train_state({"embed": jnp.zeros((V, 2 * D)), "head": jnp.zeros((2 * D, V))}, OPTIMIZER)
        with pytest.raises(UserError, match="another model") as caught:
            checkpoints.restore(wider)
        assert "\n" not in str(caught.value)


def test_master_parameters_are_float32_and_the_given_ones_survive():
    params = init_params(jnp.bfloat16)
    state = run(init_train_state(params, OPTIMIZER), 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert not params["embed"].is_deleted()


def test_evaluation_is_the_mean_over_windows_whatever_the_batch():
    windows = np.concatenate([batch_fn(0), batch_fn(1)])[:5]
    params = init_params()
    losses = [make_evaluator(bigram, batch_size)(params, windows) for batch_size in (1, 2, 5, 8)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)  # float32 sums in another order
