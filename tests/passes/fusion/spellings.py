"""Norms, rotations and gates as people write them: those that must match, and those that only look like it."""

import jax
import jax.numpy as jnp
import numpy as np

_R = np.random.RandomState(0)
X, W, B = (jnp.asarray(_R.randn(*s), jnp.float32) for s in ((2, 6, 8), (8,), (8,)))
HEADS, ANGLES = (jnp.asarray(_R.randn(*s), jnp.float32) for s in ((2, 6, 3, 8), (6, 4)))
GATE, UP = (jnp.asarray(_R.randn(2, 6, 8), jnp.float32) for _ in range(2))
rsqrt = jax.lax.rsqrt


def vec(w):
    return w[None, None]


def mean(x, axis=-1):
    return jnp.mean(x, axis, keepdims=True)


def centred(x):
    return x - mean(x)


RMS = {
    "rsqrt": lambda x, w, b: x * rsqrt(mean(x**2) + 1e-5) * vec(w),
    "weight first": lambda x, w, b: vec(w) * (x * rsqrt(mean(x * x) + 1e-5)),
    "weight into the root": lambda x, w, b: x * (rsqrt(mean(jnp.square(x)) + 1e-5) * vec(w)),
    "quotient": lambda x, w, b: x / jnp.sqrt(mean(x**2) + 1e-5) * vec(w),
    "weighted quotient": lambda x, w, b: x * vec(w) / jnp.sqrt(mean(x**2) + 1e-5),
    "inverse": lambda x, w, b: x * (1.0 / jnp.sqrt(mean(x**2) + 1e-5)),
    "sum": lambda x, w, b: x * rsqrt(jnp.sum(x * x, -1)[..., None] / 8 + 1e-5) * vec(w),
    "sum times": lambda x, w, b: x * rsqrt(jnp.sum(x * x, -1)[..., None] * 0.125 + 1e-5) * vec(w),
    "offset": lambda x, w, b: x * rsqrt(mean(x**2) + 1e-5) * (1.0 + vec(w)),
    "a mean of 0": lambda x, w, b: (x - jnp.zeros((2, 6, 1))) * (rsqrt(mean(x**2) + 1e-5) * vec(w)),
    "no epsilon": lambda x, w, b: x / jnp.sqrt(mean(x**2)),
    "epsilon outside": lambda x, w, b: x / (jnp.sqrt(mean(x**2)) + 0.1) * vec(w),
    "power": lambda x, w, b: x * jnp.power(mean(x**2) + 1e-5, -0.5),
    "other axis": lambda x, w, b: x * rsqrt(mean(x**2, 1) + 1e-5) * w[None, :6, None],
    "weight per position": lambda x, w, b: x * rsqrt(mean(x**2) + 1e-5) * x[:1],
    "of heads": lambda x, w, b: (lambda h: h * rsqrt(mean(h**2) + 1e-5))(x.reshape(2, 6, 2, 4)).reshape(x.shape),
}
NO_RMS = {
    "other count": lambda x, w, b: x * rsqrt(jnp.sum(x**2, -1, keepdims=True) / 7 + 1e-5) * vec(w),
    "other value": lambda x, w, b: (x + 1.0) * rsqrt(mean(x**2) + 1e-5) * vec(w),
    "other axes": lambda x, w, b: jnp.swapaxes(x[:, :, :6], 1, 2) * rsqrt(mean(x[:, :, :6] ** 2) + 1e-5),
    "escapes": lambda x, w, b: (lambda i: (x * i * vec(w), i))(rsqrt(mean(x**2) + 1e-5)),
    "third power": lambda x, w, b: x * rsqrt(mean(x**3) + 10.0),
    "stopped": lambda x, w, b: x * rsqrt(mean(jax.lax.stop_gradient(x) ** 2) + 1e-5),
    "clamped": lambda x, w, b: x / jnp.maximum(jnp.sqrt(mean(x**2)), 1e-5),
}
LAYER = {
    "two passes": lambda x, w, b: centred(x) * rsqrt(mean(centred(x) ** 2) + 1e-5) * vec(w) + vec(b),
    "jnp.var": lambda x, w, b: (x - mean(x)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * vec(w) + vec(b),
    "one pass": lambda x, w, b: centred(x) * rsqrt(mean(x**2) - mean(x) ** 2 + 1e-5) * vec(w) + vec(b),
    "held at 0": lambda x, w, b: (
        centred(x) * (rsqrt(jnp.maximum(0.0, mean(x * x) - mean(x) * mean(x)) + 1e-5) * vec(w)) + vec(b)
    ),
    "no bias": lambda x, w, b: vec(w) * centred(x) / jnp.sqrt(mean(centred(x) ** 2) + 1e-5),
    "no weight": lambda x, w, b: centred(x) / jnp.sqrt(mean(centred(x) ** 2) + 1e-5),
    "bias alone": lambda x, w, b: vec(b) + centred(x) * rsqrt(mean(centred(x) ** 2) + 1e-5),
    "jnp.std": lambda x, w, b: centred(x) / (jnp.std(x, -1, keepdims=True) + 0.01) * vec(w),
}
NO_LAYER = {
    "ddof": lambda x, w, b: centred(x) / jnp.sqrt(jnp.var(x, -1, keepdims=True, ddof=1) + 1e-5) * vec(w) + vec(b),
    "variance escapes": lambda x, w, b: (lambda v: (centred(x) * rsqrt(v + 1e-5), v))(mean(centred(x) ** 2)),
    "other mean": lambda x, w, b: (x - mean(x, 1)) * rsqrt(mean(centred(x) ** 2) + 1e-5),
}


def tables(angles):
    return jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]


def turn(a, b, cos, sin):
    return a * cos - b * sin, a * sin + b * cos


def full(angles, join):
    return tuple(join(t) for t in tables(angles))


def twofold(t):
    return jnp.concatenate([t, t], -1)


def evens(x):
    return x[..., ::2], x[..., 1::2]


def of_pairs(x):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def woven(a, b):
    return jnp.stack([a, b], -1).reshape(*a.shape[:-1], -1)


def rotate_half(x):
    return jnp.concatenate([-x[..., 4:], x[..., :4]], -1)


def rotate_every_two(x):
    a, b = evens(x)
    return woven(-b, a)


ROPE = {
    "split": lambda x, t: jnp.concatenate(turn(*jnp.split(x, 2, -1), *tables(t)), -1),
    "slices": lambda x, t: jnp.concatenate(turn(x[..., :4], x[..., 4:], *tables(t)), -1),
    "rotate_half": lambda x, t: (lambda c, s: x * c + rotate_half(x) * s)(*full(t, twofold)),
    "two angles a pair": lambda x, t: x * jnp.cos(x[:1, :, :1]) + rotate_half(x) * jnp.sin(x[:1, :, :1]),
    "even and odd": lambda x, t: woven(*turn(*evens(x), *tables(t))),
    "pairs": lambda x, t: woven(*turn(*of_pairs(x), *tables(t))),
    "rotate_every_two": lambda x, t: (lambda c, s: x * c + rotate_every_two(x) * s)(
        *full(t, lambda v: jnp.repeat(v, 2, -1))
    ),
    "even to half": lambda x, t: jnp.concatenate(turn(*evens(x), *tables(t)), -1),
    "partial": lambda x, t: jnp.concatenate(
        [jnp.concatenate(turn(x[..., :2], x[..., 2:4], *tables(t[:, :2])), -1), x[..., 4:]], -1
    ),
    "behind a projection": lambda x, t: jnp.concatenate(
        turn(*jnp.split(x.reshape(2, 6, 24).reshape(2, 6, 3, 8), 2, -1), *tables(t)), -1
    ).swapaxes(1, 2),
}
NO_ROPE = {
    "other way": lambda x, t: (lambda a, b, c, s: jnp.concatenate([a * c + b * s, b * c - a * s], -1))(
        *jnp.split(x, 2, -1), *tables(t)
    ),
    "one half twice": lambda x, t: (lambda a, b, c, s: jnp.concatenate([a * c - b * s, a * c + b * s], -1))(
        *jnp.split(x, 2, -1), *tables(t)
    ),
    "quarters": lambda x, t: jnp.concatenate(turn(x[..., :2], x[..., 4:6], *tables(t[:, :2])), -1),
    "product escapes": lambda x, t: (lambda a, b, c, s: (jnp.concatenate(turn(a, b, c, s), -1), a * c))(
        *jnp.split(x, 2, -1), *tables(t)
    ),
}
GATED = {
    "silu": lambda g, u: jax.nn.silu(g) * u,
    "silu by exp": lambda g, u: u * (g / (1.0 + jnp.exp(-g))),
    "silu grouped": lambda g, u: g * (u * jax.nn.sigmoid(g)),
    "gelu_tanh": lambda g, u: u * jax.nn.gelu(g),
    "gelu_tanh by hand": lambda g, u: 0.5 * g * (1 + jnp.tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u,
    "gelu_erf": lambda g, u: jax.nn.gelu(g, approximate=False) * u,
    "gelu_erf by hand": lambda g, u: u * (0.5 * g * (1.0 + jax.lax.erf(g / 1.4142135623730951))),
    "relu": lambda g, u: jax.nn.relu(g) * u,
}
NO_GATE = {
    "other constant": lambda g, u: u * (0.5 * g * (1.0 + jax.lax.erf(g / 1.4))),
    "a scale": lambda g, u: jax.nn.silu(g) * 3.0,
    "a vector": lambda g, u: jax.nn.silu(g) * u[:1, :1],
    "quick": lambda g, u: u * g * jax.nn.sigmoid(1.702 * g),
    "other sigmoid": lambda g, u: u * g * jax.nn.sigmoid(u + 1.0),
    "read elsewhere": lambda g, u: (lambda a: (a * u, a))(jax.nn.gelu(g)),
}
