"""Eight virtual CPU devices, run-time checks of shapes and types, and JAX's strict modes for tests that ask for them.

This file is imported before any test module, so everything that must happen before JAX initialises its devices, and
before our packages are imported, happens here.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 - the hook below looks it up as an attribute of `tests`

# A busy machine is no failure.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook(["fastgpt_jax", "passes", "sharding"], "tests.typechecker.check")


@pytest.fixture
def strict_jax():
    """Strict dtype promotion and no rank promotion, for tests that run our own code and nobody else's."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
