import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from passes.drop_placement import drop_placement
from passes.reader import trace
from passes.replay import evaluate
from sharding import make_mesh


def test_constraints_are_dropped_wherever_they_stand():
    whole = NamedSharding(make_mesh(2), PartitionSpec())

    def body(carry, x):
        return jax.lax.with_sharding_constraint(carry * x, whole), carry

    def fn(x):
        x = jax.lax.with_sharding_constraint(jnp.sin(x), whole)
        final, steps = jax.lax.scan(body, x[0], x)
        return jax.lax.with_sharding_constraint(final, whole), steps

    x = np.linspace(1, 2, 5, dtype=np.float32)
    graph, _ = trace(fn, jax.ShapeDtypeStruct(x.shape, x.dtype))
    before = graph.count()
    assert drop_placement(graph) == 3
    assert graph.count() == before - 3
    assert "sharding_constraint" not in {op.name for _, op in graph.walk()}
    for got, want in zip(jax.jit(lambda x: evaluate(graph, [x]))(x), fn(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)  # XLA may contract a product and a sum
    assert drop_placement(graph) == 0
