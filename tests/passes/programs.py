"""Small programs that between them use the primitives and the control flow that graphs must carry."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

W = jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)


def elementwise(x):
    return jnp.where(x > 0, jnp.tanh(x) * 2 + 1, jnp.exp(-jnp.abs(x))) ** 2 / (1 + jnp.cosh(x))


def softmax(x):
    return jax.nn.softmax(x @ W, axis=-1)


def layout(x):
    y = jnp.pad(x.T[None, :, ::-1], ((0, 0), (1, 2), (0, 1)), constant_values=3.0)
    return jnp.concatenate([y.reshape(-1), jnp.repeat(x[1:, :2], 2, axis=0).ravel()])


def indexing(x):
    i = jnp.argsort(x[:, 0])
    return x[i].at[0, 1:3].add(5.0), lax.dynamic_slice(x, (i[0], 1), (1, 2)), jnp.take_along_axis(x, x.argsort(1), 1)


def reductions(x):
    return x.sum(0), x.max(1), x.prod(), jnp.cumsum(x, 0), jnp.any(x > 1), jnp.argmax(x, 1), lax.top_k(x, 2)


def convolution(x):
    kernel = jnp.linspace(0.0, 1.0, 3 * 4 * 2).reshape(3, 4, 2)
    return lax.conv_general_dilated(x[None], kernel, (1,), ((2, 0),), dimension_numbers=("NWC", "WIO", "NWC"))


def scanned(x):
    def step(carry, row):
        total, weight = carry
        return (total @ weight + row, weight), total.sum()

    return lax.scan(step, (x, W), x[:, None, :] * 1.0, reverse=True)


def fori(x):
    return lax.fori_loop(0, 3, lambda i, y: y * i + W[0], x)


def while_loop(x):
    return lax.while_loop(
        lambda s: (s[1] < 5) & (s[0].sum() < 1e3), lambda s: (s[0] * 1.5 + s[2], s[1] + 1, s[2]), (x, 0, x)
    )


def conditional(x):
    return lax.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: (x - w) * 2, x, W)


def switch(x):
    return lax.switch(2, [jnp.sin, jnp.cos, lambda x: x + 1.0], x)


def custom_jvp(x):
    return jax.nn.silu(x) + jax.nn.relu(x) + jax.numpy.logaddexp(x, 0.5)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g * 2.0,))


def custom_vjp(x):
    return straight_through(x * 3.0) * x


def remat(x):
    return jax.checkpoint(lambda x: jnp.sin(checkpoint_name(x @ W, "hidden")))(x)


def nested(x):
    def step(carry, row):
        body = lambda i, y: lax.cond(i < 1, lambda y: y + row, lambda y: y * 1.0, y)
        return lax.fori_loop(0, 2, body, carry), jax.jit(jnp.sin)(row)

    return lax.scan(step, x[0], x)


def integers(x):
    i = x.astype(jnp.int32)
    return (i // 3, i % 3, i << 1, i & 3, i.astype(jnp.uint8), jnp.iinfo(jnp.int32).max - i)


def complex_numbers(x):
    z = lax.complex(x, x[::-1])
    return (z * jnp.exp(1j * x)).real, jnp.abs(jnp.fft.fft(x, axis=0))


def random(x):
    return x + jax.random.normal(jax.random.fold_in(jax.random.key(0), 3), x.shape)


def narrow(x):
    return (x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16) * 2).astype(jnp.float32)


PROGRAMS = {
    fn.__name__: fn
    for fn in [
        elementwise,
        softmax,
        layout,
        indexing,
        reductions,
        convolution,
        scanned,
        fori,
        while_loop,
        conditional,
        switch,
        custom_jvp,
        custom_vjp,
        remat,
        nested,
        integers,
        complex_numbers,
        random,
        narrow,
    ]
}
NOT_DIFFERENTIABLE = ("indexing", "reductions", "while_loop", "switch", "integers", "complex_numbers", "random")
DIFFERENTIABLE = [name for name in PROGRAMS if name not in NOT_DIFFERENTIABLE]
