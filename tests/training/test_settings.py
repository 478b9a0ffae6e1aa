"""Settings come from mappings, and a mistake in one is named."""

import pytest

from configs import demo
from fastgpt_jax.errors import UserError
from fastgpt_jax.training.settings import TrainSettings


def test_nested_values_are_read():
    settings = TrainSettings.from_mapping({"steps": 500, "optimizer": {"learning_rate": 1}})
    assert settings.steps == 500
    assert settings.optimizer.learning_rate == 1.0
    assert isinstance(settings.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"stesp": 5}, "unknown config key stesp; did you mean steps?"),
        ({"model": {"hidden_sizes": 5}}, "unknown config key model.hidden_sizes; did you mean model.hidden_size?"),
        ({"model": 5}, "config key model must be a group of settings"),
        ({"steps": "many"}, "config key steps must be of type int, got 'many'"),
        ({"steps": True}, "config key steps must be of type int, got True"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"data": {"valid_fraction": 1.5}}, "data.valid_fraction must lie between 0 and 1"),
        ({"data": {"window_tokens": 9999}}, "data.window_tokens must be no more than model.max_position_embeddings"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate must be finite and above 0, got nan"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate must be finite and above 0, got -1.0"),
        ({"steps": 10}, "optimizer.warmup_steps must be less than steps"),
    ],
)
def test_a_mistake_is_one_clear_line(mapping, message):
    with pytest.raises(UserError) as caught:
        TrainSettings.from_mapping(mapping)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_demo_config_is_read_whole():
    settings = TrainSettings.from_mapping(demo.get_config().to_dict())
    assert settings.model.max_position_embeddings >= settings.data.window_tokens
