"""What is taken as a forward and its parameters, and what is said where it cannot be traced."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from fastgpt_jax.compiler.capture import as_forward, capture
from fastgpt_jax.errors import UserError

PARAMS = {"embed": np.ones((7, 4), np.float32)}


def missing_key(params, tokens):
    return params["nope"][tokens]


def not_implemented(params, tokens):
    raise NotImplementedError("later")


def test_a_forward_that_fails_is_told_with_the_users_line():
    line = inspect.getsourcelines(missing_key)[1] + 1
    with pytest.raises(UserError, match=rf"KeyError: 'nope' \(.*test_capture.py:{line}\)"):
        capture(*as_forward(missing_key, PARAMS), 16)


def test_a_forward_that_is_not_implemented_is_a_users_mistake():
    with pytest.raises(UserError, match="NotImplementedError: later"):
        capture(*as_forward(not_implemented, PARAMS), 16)


def test_parameters_that_are_no_arrays_are_named():
    with pytest.raises(UserError, match="got a str among them: 'x'"):
        capture(*as_forward(missing_key, {"embed": "x"}), 16)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3, 4)])
def test_what_is_no_logits_is_refused_with_its_shape(shape):
    with pytest.raises(UserError, match=r"must return logits \[1, T, V\]"):
        capture(*as_forward(lambda params, tokens: jnp.zeros(shape) + params["embed"][0, 0], PARAMS), 16)


def test_a_forward_that_takes_multiples_only_is_traced_at_the_next_one():
    def fn(params, tokens):
        if tokens.shape[1] % 16:
            raise ValueError("T must be a multiple of 16")
        return params["embed"][tokens]

    captured = capture(*as_forward(fn, PARAMS), 40)
    assert captured.capacity == 48
    assert captured.times.short % 16 == 0


def test_unknown_meanings_of_arguments_are_refused():
    with pytest.raises(UserError, match="arguments must mean one of"):
        as_forward(missing_key, PARAMS, {"pos": "place"})
