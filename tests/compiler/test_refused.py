"""Models that have no exact cached step are refused, with the reason and the user's line, and never served.

Refusals of structure come from tracing and deriving and are quick; those of values need the certificate, which is
run twice before a model is refused.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fastgpt_jax
from passes.incremental.errors import NotServable
from tests.compiler import zoo

OF_VALUES = frozenset(
    """
    bidirectional mask_off_by_one mask_upside_down mask_in_blocks mask_in_whole_blocks mask_multiplied
    mask_leaves_first_row_empty softmax_over_queries mixing_without_mask scaled_by_log_length divided_by_length
    last_token_marked last_tokens_see_all embed_from_the_end embed_by_reversed_table embed_by_fraction dynamic_rope
    shifted_rope capacity_of_length rolled_around gathered_ahead last_token_added
    """.split()
)
CONFIG = fastgpt_jax.CompileConfig(max_model_len=32, max_num_seqs=2)


def refusals() -> Any:
    """One test for each refused model; those that need the certificate are slow."""
    cases = [pytest.param(m, id=m.name, marks=pytest.mark.slow if m.name in OF_VALUES else ()) for m in zoo.REFUSED]
    return pytest.mark.parametrize("model", cases)


def refusal_of(model: zoo.ZooModel) -> NotServable:
    with zoo.jax_defaults():
        fn, params = model.make()
        with pytest.raises(NotServable) as caught:
            fastgpt_jax.compile(fn, params, CONFIG)
    return caught.value


@refusals()
def test_refusal_gives_the_reason_and_the_guilty_line(model: zoo.ZooModel):
    error = refusal_of(model)
    assert isinstance(error, ValueError)
    assert model.reason is not None and model.reason.lower() in str(error).lower()
    filename, lines = zoo.guilty_lines(model)
    file, line = error.source.frames[0]
    assert os.path.samefile(file, filename) and line in lines
    assert f"refused.py:{line}" in str(error)  # what a user reads is the same line
    assert error.op_name is not None and error.op_name in str(error)
    assert "\n" not in str(error)


def test_refusals_of_values_are_models_of_the_zoo():
    assert OF_VALUES <= {model.name for model in zoo.REFUSED}


def test_refusal_inside_scanned_layers_names_the_line_in_the_body():
    """The leak stands in the second layer's trip of a loop, whose body is one line of the user's."""

    def fn(params, tokens):
        def layer(x, p):
            s = jnp.einsum("btd,bsd->bts", x @ p, x)
            s = jnp.where(jnp.tri(x.shape[1], dtype=bool), s, 0.0)  # a mask that hides nothing behind a softmax
            return x + jax.nn.softmax(s) @ x, None

        return jax.lax.scan(layer, params["embed"][tokens], params["layers"])[0] @ params["embed"].T

    keys = jax.random.split(jax.random.key(0))
    params = {"embed": jax.random.normal(keys[0], (11, 8)), "layers": 0.3 * jax.random.normal(keys[1], (2, 8, 8))}
    with pytest.raises(NotServable, match="not causal") as caught:
        fastgpt_jax.compile(fn, params, fastgpt_jax.CompileConfig(max_model_len=16))
    file, line = caught.value.source.frames[0]
    assert os.path.samefile(file, __file__)
    assert line == fn.__code__.co_firstlineno + 4
