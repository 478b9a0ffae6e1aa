"""Models with parameters from NumPy: no random initialisation is compiled, which is most of such a test's time."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def make_filled_model(module_class, config) -> nnx.Module:
    """The module with deterministic parameters: norm weights around one, the rest around zero."""
    generator = np.random.RandomState(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module_class(config, rngs=nnx.Rngs(0))))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        values = generator.standard_normal(leaf.shape) * 0.3 + (1.0 if path[-1] == "weight" else 0.0)
        filled.append((path, variable.replace(jnp.asarray(values.astype(leaf.dtype)))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
