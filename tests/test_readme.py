"""The README's own model runs as written, and its commands exist."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from fastgpt_jax.cli.main import TOOLS

README = Path(__file__).parents[1] / "README.md"


def _params():
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return 0.3 * jax.random.normal(next(keys), shape)

    layers = [{name: normal(16, 16) for name in "qkv"} for _ in range(2)]
    return {"embed": normal(32, 16), "position": jnp.zeros((512, 16)), "layers": layers}


def test_the_model_of_the_readme_is_served_as_written():
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    names = {"params": _params()}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own text
    served = [list(output.outputs[0].token_ids) for output in names["outputs"]]
    forward = jax.jit(names["model"])
    for prompt, continued in zip([[1, 2, 3], [4, 5]], served, strict=True):
        tokens = jnp.asarray([prompt + continued + [0] * (3 - len(prompt))])  # one length; the model is causal
        likeliest = jnp.argmax(forward(names["params"], tokens)[0], axis=-1).tolist()
        assert continued == likeliest[len(prompt) - 1 : len(prompt) - 1 + 32]


def test_every_command_the_readme_names_exists():
    named = set(re.findall(r"fastgpt ([a-z_]+)", README.read_text()))
    assert named and named <= set(TOOLS)
