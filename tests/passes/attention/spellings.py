"""Attention in a thousand spellings: `sample(seed)` draws one, from layouts to loops.

Imports nothing of the compiler: what is written here is what a user may write. The one idea: an array goes with a
string that names its dimensions (b batch, n heads, k KV heads, g heads that share one, t queries, s keys, h width, e
width of values, f batch times heads, r a latent, p rotated width, d distances), so that one body can be written in any
layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Spelling:
    """A function with arguments to call it on.

    Attributes:
      name: What was drawn, to be read where one fails.
      num_attentions: How many are written in `fn`, those in a loop's body once.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    num_attentions: int = 1


@dataclass
class Named:
    """An array with a letter for each of its dimensions."""

    x: Any
    letters: str

    def to(self, wanted: str) -> Any:
        """The array with the dimensions `wanted`, of size 1 where it has none."""
        held = "".join(c for c in wanted if c in self.letters)
        assert len(held) == len(self.letters), (self.letters, wanted)
        x = self.x
        if held != self.letters:
            x = jnp.transpose(x, [self.letters.index(c) for c in held])
        absent = [i for i, c in enumerate(wanted) if c not in held]
        return jnp.expand_dims(x, absent) if absent else x

    def map(self, fn: Callable[[Any], Any]) -> Named:
        return Named(fn(self.x), self.letters)


# ------------------------------------------------------------------------------------------------ contractions
def contract(how: str, x: Named, y: Named, out: str) -> Named:
    """The sum of products over the letters that both have and `out` lacks."""
    summed = "".join(c for c in x.letters if c in y.letters and c not in out)
    if how == "einsum":
        return Named(jnp.einsum(f"{x.letters},{y.letters}->{out}", x.x, y.x), out)
    if how == "dot_general":
        return _dot_general(x, y, summed, out)
    if how == "matmul":
        row = next(c for c in reversed(x.letters) if c in "th" and c not in y.letters)
        column = next(c for c in reversed(y.letters) if c not in x.letters)
        batch = "".join(c for c in out if c not in row + column)
        natural = batch + row + column
        made = jnp.matmul(x.to(batch + row + summed), y.to(batch + summed + column))
        return Named(Named(made, natural).to(out), out)
    product = x.to(out + summed) * y.to(out + summed)
    axes = tuple(range(len(out), len(out + summed)))
    return Named(jnp.sum(product, axis=axes if len(axes) > 1 else axes[0]), out)


def _dot_general(x: Named, y: Named, summed: str, out: str) -> Named:
    batch = "".join(c for c in x.letters if c in y.letters and c in out)
    numbers = (
        ([x.letters.index(c) for c in summed], [y.letters.index(c) for c in summed]),
        ([x.letters.index(c) for c in batch], [y.letters.index(c) for c in batch]),
    )
    natural = batch + "".join(c for z in (x, y) for c in z.letters if c not in summed + batch)
    return Named(Named(lax.dot_general(x.x, y.x, numbers), natural).to(out), out)


# ------------------------------------------------------------------------------------------------ drawing
SIZES = (
    {"b": 2, "t": 5, "s": 7, "n": 4, "k": 2, "h": 6, "e": 3},
    {"b": 4, "t": 4, "s": 4, "n": 4, "k": 2, "h": 4, "e": 4},
    {"b": 2, "t": 6, "s": 6, "n": 6, "k": 3, "h": 8, "e": 8},
    {"b": 3, "t": 1, "s": 8, "n": 4, "k": 2, "h": 4, "e": 4},
    {"b": 1, "t": 5, "s": 5, "n": 6, "k": 2, "h": 4, "e": 4},
    {"b": 2, "t": 4, "s": 6, "n": 2, "k": 2, "h": 4, "e": 6},
)
"""Sizes that tell all axes apart, sizes that tell none, single queries, single requests."""


@dataclass
class Draw:
    """One drawing: choices by name, and the arguments that they called for."""

    seed: int
    said: list[str] = field(default_factory=list)
    args: list[Any] = field(default_factory=list)
    letters: list[str] = field(default_factory=list)
    drawn: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = np.random.RandomState(self.seed)
        self.sizes = dict(self.pick("sizes", *SIZES))
        self.sizes |= {"g": self.sizes["n"] // self.sizes["k"], "d": 4, "p": 2, "r": 5}
        self.said.clear()
        self.said.append("".join(f"{c}{n}" for c, n in self.sizes.items()))
        self.dtype = jnp.dtype(self.pick("dtype", "float32", "float32", "bfloat16"))

    def pick(self, what: str, *options: Any) -> Any:
        """One of the options; an option that is there twice is twice as likely."""
        chosen = options[self.random.randint(len(options))]
        self.said.append(f"{what}={chosen}")
        return chosen

    def chance(self, what: str, percent: int) -> bool:
        happens = self.random.randint(100) < percent
        if happens:
            self.said.append(what)
        return happens

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[c] for c in letters if c.isalpha())

    def read(self, x: Any, letters: str) -> Named:
        """An argument with every letter a dimension."""
        flat = "".join(_groups(letters))
        return Named(x if flat == letters else jnp.reshape(x, self.shape(flat)), flat)

    def arg(self, letters: str, values: Any = None) -> int:
        """A new argument; normal numbers unless given."""
        if values is None:
            self.drawn.add(len(self.args))
            values = self.random.randn(*self.shape(letters))
        array = np.asarray(values)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        self.args.append(array.reshape([math.prod(self.shape(group)) for group in _groups(letters)]))
        self.letters.append(letters)
        return len(self.args) - 1

    @property
    def name(self) -> str:
        return f"{self.seed}: " + " ".join(self.said)


def _groups(letters: str) -> list[str]:
    """The letters of each dimension."""
    return [group.strip("()") for group in re.findall(r"\(\w+\)|\w", letters)]


Part = Callable[[Sequence[Named]], Named]
"""What a drawn part computes from the arguments."""


# ------------------------------------------------------------------------------------------------ masks
def _positions(draw: Draw, how: str, start: int | Part) -> tuple[Callable[[Any], Named], Callable[[], Named]]:
    """Query and key positions, as i32."""
    T, S = draw.sizes["t"], draw.sizes["s"]

    def query(args: Any) -> Named:
        at = Named(jnp.arange(T), "t")
        if how == "broadcasted_iota":
            at = Named(lax.broadcasted_iota(jnp.int32, (T, S), 0), "ts")
        if callable(start):
            begin = start(args)
            letters = begin.letters + at.letters
            return Named(begin.to(letters) + at.to(letters), letters)
        return at.map(lambda x: x + start) if start else at

    def key() -> Named:
        if how == "broadcasted_iota":
            return Named(lax.broadcasted_iota(jnp.int32, (T, S), 1), "ts")
        return Named(np.arange(S) if how == "numpy" else jnp.arange(S), "s")

    return query, key


def _compared(first: Named, second: Named, fn: Callable[[Any, Any], Any]) -> Named:
    letters = "".join(dict.fromkeys(first.letters + second.letters))
    return Named(fn(first.to(letters), second.to(letters)), letters)


def _causal(draw: Draw, window: int | None) -> Part:
    T, S = draw.sizes["t"], draw.sizes["s"]
    off = S - T
    how = draw.pick("causal", "tril", "arange", "broadcasted_iota", "numpy", "not triu", "constant", "argument", "sub")
    if how in ("tril", "not triu"):

        def by_triangle(args: Any) -> Named:
            ones = jnp.ones((S, S), jnp.bool_)
            seen = jnp.tril(ones) if how == "tril" else ~jnp.triu(ones, k=1)
            if window is not None:
                seen = jnp.triu(seen, k=1 - window)
            return Named(seen[off:], "ts")

        return by_triangle
    dense = np.tril(np.ones((T, S), bool), off)
    if window is not None:
        dense &= np.triu(np.ones((T, S), bool), off + 1 - window)
    if how == "constant":
        return lambda args: Named(dense, "ts")
    if how == "argument":
        place = draw.arg("ts", dense)
        return lambda args: args[place]
    query, key = _positions(draw, how, off)

    def by_comparison(args: Any) -> Named:
        q, k = query(args), key()
        if how == "sub":
            distance = _compared(q, k, lambda a, b: a - b)
            return distance.map(lambda x: (x >= 0) if window is None else (x >= 0) & (x < window))
        if window is None:
            return _compared(q, k, lambda a, b: a >= b)
        return _compared(q, k, lambda a, b: (b <= a) & (b > a - window))

    return by_comparison


def _keys(draw: Draw, b: str, least: int) -> Part:
    """Padding behind so many keys or more."""
    S = draw.sizes["s"]
    lengths = np.asarray(draw.random.randint(min(least, S), S + 1, draw.shape(b)))
    flags = np.arange(S) < lengths[..., None]
    how = draw.pick("padding", "bool", "int != 0", "int > 0", "int bool", "float", "length", "length")
    if how == "length":
        place = draw.arg(b, lengths.astype(np.int32))
        return lambda args: _compared(args[place], Named(jnp.arange(S), "s"), lambda a, b: b < a)
    values = flags if how == "bool" else flags.astype(np.float32 if how == "float" else np.int32)
    place = draw.arg(b + "s", values)
    tests = {
        "bool": lambda x: x,
        "int != 0": lambda x: x != 0,
        "int > 0": lambda x: x > 0,
        "int bool": lambda x: x.astype(bool),
        "float": lambda x: x > 0.5,
    }
    return lambda args: args[place].map(tests[how])


def _segments(draw: Draw, b: str) -> Part:
    T, S = draw.sizes["t"], draw.sizes["s"]
    keys = np.sort(draw.random.randint(0, 3, draw.shape(b + "s")), axis=-1).astype(np.int32)
    keys[..., -2:] = keys[..., -1:]
    first, second = draw.arg(b + "t", keys[..., S - T :]), draw.arg(b + "s", keys)
    return lambda args: _compared(args[first], args[second], lambda a, b: a == b)


def _started(draw: Draw, b: str) -> Part:
    """Causal behind what a cache holds already, a number known at run time."""
    T, S = draw.sizes["t"], draw.sizes["s"]
    letters = draw.pick("start", b, "")
    place = draw.arg(letters, np.asarray(draw.random.randint(0, S - T + 1, draw.shape(letters)), np.int32))
    query, key = _positions(draw, "arange", lambda args: args[place])
    return lambda args: _compared(query(args), key(), lambda q, k: k <= q)


def _dense(draw: Draw, b: str, n: str) -> Part:
    T, S = draw.sizes["t"], draw.sizes["s"]
    letters = draw.pick("dense", b + "ts", n + "ts", b + n + "ts")
    values = draw.random.randint(0, 2, draw.shape(letters)).astype(bool)
    values |= np.arange(S) == np.arange(T)[:, None]
    place = draw.arg(letters, values)
    return lambda args: args[place]


def _prefix(draw: Draw) -> Part:
    S = draw.sizes["s"]
    length = draw.pick("prefix", 1, 2)
    return lambda args: Named(jnp.arange(S) < length, "s")


def draw_mask(draw: Draw, b: str, n: str) -> Part | None:
    """A predicate that lets every query see a key, or None."""
    kinds = draw.pick(
        "mask",
        "none",
        "causal",
        "causal",
        "window",
        "padding",
        "segments",
        "start",
        "dense",
        "causal padding",
        "window segments",
        "causal segments padding",
        "window prefix",
        "causal prefix",
        "window prefix padding segments",
    ).split()
    if kinds == ["none"]:
        return None
    parts: list[Part] = []
    union: Part | None = None
    for kind in kinds:
        if kind in ("causal", "window"):
            parts.append(_causal(draw, draw.pick("width", 2, 3) if kind == "window" else None))
        elif kind == "padding":
            is_narrow = "window" in kinds or "segments" in kinds
            parts.append(_keys(draw, b, draw.sizes["s"] - 1 if is_narrow else 1))
        elif kind == "segments":
            parts.append(_segments(draw, b))
        elif kind == "start":
            parts.append(_started(draw, b))
        elif kind == "dense":
            parts.append(_dense(draw, b, n))
        else:
            union = _prefix(draw)
    how = draw.pick("and", "&", "logical_and", "where") if len(parts) > 1 else "&"

    def predicate(args: Any) -> Named:
        seen = parts[0](args)
        if union is not None:
            seen = _compared(seen, union(args), lambda x, y: x | y)
        for part in parts[1:]:
            ways = {
                "&": lambda x, y: x & y,
                "logical_and": jnp.logical_and,
                "where": lambda x, y: jnp.where(x, y, False),
            }
            seen = _compared(seen, part(args), ways[how])
        return seen

    return predicate


def draw_fill(draw: Draw) -> tuple[Callable[[Any], Any], bool]:
    """What masked scores become, for a dtype, and whether it is finite."""
    how = draw.pick("fill", "-inf", "finfo.min", "-1e9", "-1e30")
    fills = {
        "-inf": lambda dtype: -jnp.inf,
        "finfo.min": lambda dtype: jnp.finfo(dtype).min,
        "-1e9": lambda dtype: -1e9,
        "-1e30": lambda dtype: jnp.asarray(-1e30, dtype),
    }
    return fills[how], how != "-inf"


def draw_masking(draw: Draw) -> Callable[[Named, Named], Named]:
    """How a predicate acts on scores."""
    fill, is_finite = draw_fill(draw)
    finite = ("inverse product", "blend") if is_finite else ()
    how = draw.pick("masked by", "where", "where", "inverse where", "add", "select", "sum of where", *finite)

    def act(score: Named, mask: Named) -> Named:
        x, seen, low = score.x, mask.to(score.letters), fill(score.x.dtype)
        if how == "where":
            out = jnp.where(seen, x, low)
        elif how == "inverse where":
            out = jnp.where(jnp.logical_not(seen), low, x)
        elif how == "add":
            out = x + jnp.where(seen, 0.0, low).astype(x.dtype)
        elif how == "select":
            out = lax.select(jnp.broadcast_to(seen, x.shape), x, jnp.full_like(x, low))
        elif how == "sum of where":
            bias = jnp.zeros(np.shape(seen), x.dtype)
            out = x + jnp.where(seen, bias, jnp.full_like(bias, low))
        elif how == "inverse product":
            out = x + (1.0 - jnp.asarray(seen).astype(x.dtype)) * low
        else:
            ones = jnp.asarray(seen).astype(x.dtype)
            out = x * ones + low * (1 - ones)
        return Named(out, score.letters)

    return act


# ------------------------------------------------------------------------------------------------ scores
def draw_bias(draw: Draw, b: str, n: str) -> Part | None:
    how = draw.pick("bias", "none", "none", "none", "alibi", "alibi keys", "table", "dense", "dense")
    T, S = draw.sizes["t"], draw.sizes["s"]
    if how == "none":
        return None
    if how == "dense":
        letters = draw.pick("bias over", "ts", n + "ts", b + n + "ts", b + "s", "s" + n)
        place = draw.arg(letters)
        return lambda args: args[place]
    if how == "table":
        place = draw.arg(n + "d")

        def by_distance(args: Any) -> Named:
            distance = jnp.clip(jnp.arange(T)[:, None] + S - T - jnp.arange(S), 0, 3)
            return Named(jnp.take(args[place].x, distance, axis=-1), n + "ts")

        return by_distance
    slopes = np.asarray([2.0**-i for i in range(1, 1 + (draw.sizes["n"] if n else 1))], np.float32)
    place = (
        draw.arg(n, slopes if n else slopes[0]) if draw.pick("slopes", "argument", "constant") == "argument" else None
    )

    def by_slope(args: Any) -> Named:
        slope = args[place] if place is not None else Named(slopes if n else slopes[0], n)
        at = Named(jnp.arange(S), "s")
        if how == "alibi":
            at = Named(-jnp.abs(jnp.arange(T)[:, None] + (S - T) - jnp.arange(S)[None]), "ts")
        return _compared(slope, at, lambda x, y: x * y)

    return by_slope


def _scaled(draw: Draw) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]:
    """What is done to queries, keys and scores."""
    width = draw.sizes["h"]
    root = math.sqrt(width)

    def same(x: Any) -> Any:
        return x

    ways = {
        "none": (same, same, same),
        "q *": (lambda x: x * width**-0.5, same, same),
        "q /": (lambda x: x / root, same, same),
        "k *": (same, lambda x: x * np.float32(1 / root).astype(x.dtype), same),
        "s *": (same, same, lambda x: x * 0.37),
        "s /": (same, same, lambda x: x / jnp.sqrt(jnp.asarray(width, x.dtype))),
        "roots": (lambda x: x * width**-0.25, lambda x: x * width**-0.25, same),
    }
    return ways[draw.pick("scale", *ways)]


def _log2e(x: Any) -> Any:
    return x * np.log2(np.e)


def draw_softmax(draw: Draw, has_sinks: bool, is_safe: bool) -> Callable[..., Named]:
    """Weights times values, from scores: `(score, sinks, weigh)` to the result, `weigh` contracting with values.

    Args:
      is_safe: Whether scores are small enough for exponentials without the maximum subtracted.
    """
    ways = ["by hand", "by hand", "stopped", "guarded", "exp2"] + (["no maximum"] if is_safe else [])
    ways += [] if has_sinks else ["softmax", "softmax", "softmax", "log_softmax", "logsumexp", "negative"]
    if has_sinks:
        ways += ["column", "column", "first column"]
    how = draw.pick("softmax", *ways)
    by_hand = ("by hand", "stopped", "guarded", "no maximum", "exp2", "negative")
    divide = draw.pick("divided", "before", "after", "1/ before", "1/ after") if how in by_hand else "before"

    def weights(score: Named, sinks: Named | None) -> tuple[Any, Any]:
        """Numerator, and denominator or None."""
        x, axis = score.x, score.letters.index("s")
        if how == "softmax":
            return jax.nn.softmax(x, axis=axis), None
        if how == "log_softmax":
            return jnp.exp(jax.nn.log_softmax(x, axis=axis)), None
        if how == "logsumexp":
            return jnp.exp(x - jax.nn.logsumexp(x, axis=axis, keepdims=True)), None
        sink = None if sinks is None else sinks.to(score.letters).astype(x.dtype)
        if how in ("column", "first column"):
            column = jnp.broadcast_to(sink, [*x.shape[:axis], 1, *x.shape[axis + 1 :]])
            joined = jnp.concatenate([x, column] if how == "column" else [column, x], axis=axis)
            first = 0 if how == "column" else 1
            return lax.slice_in_dim(jax.nn.softmax(joined, axis=axis), first, first + x.shape[axis], axis=axis), None
        exp = jnp.exp2 if how == "exp2" else jnp.exp
        if how == "exp2":
            x, sink = _log2e(x), None if sink is None else _log2e(sink)
        if how == "no maximum":
            top: Any = 0.0
            numerator = exp(x)
        else:
            top = jnp.max(x, axis=axis, keepdims=True)
            if sink is not None:
                top = jnp.maximum(top, sink)
            if how == "stopped":
                top = lax.stop_gradient(top)
            if how == "guarded":
                top = jnp.where(jnp.isfinite(top), top, 0.0)
            numerator = exp(-(top - x)) if how == "negative" else exp(x - top)
        total = jnp.sum(numerator, axis=axis, keepdims=True)
        if sink is not None:
            total = total + exp(sink - top)
        return numerator, total

    def run(score: Named, sinks: Named | None, weigh: Callable[[Named], Named]) -> Named:
        numerator, total = weights(score, sinks)
        if total is None:
            return weigh(Named(numerator, score.letters))
        if divide == "before":
            return weigh(Named(numerator / total, score.letters))
        if divide == "1/ before":
            return weigh(Named(numerator * (1 / total), score.letters))
        out = weigh(Named(numerator, score.letters))
        rest = score.letters.replace("s", "")
        below = Named(jnp.squeeze(total, score.letters.index("s")), rest).to(out.letters).astype(out.x.dtype)
        return Named(out.x / below if divide == "after" else out.x * (1.0 / below), out.letters)

    return run


# ------------------------------------------------------------------------------------------------ the whole
def _shuffled(draw: Draw, letters: str) -> str:
    """An order of dimensions: often a customary one, sometimes any."""
    return "".join(letters[i] for i in draw.random.permutation(len(letters)))


def _stored(draw: Draw, what: str, b: str, n: str, rest: str) -> str:
    """The letters of an argument; those in brackets are one dimension."""
    orders = [b + rest[0] + n + rest[1], b + n + rest, rest[0] + b + n + rest[1]]
    merged = [f"{b}{rest[0]}({n}{rest[1]})", f"({b}{n}){rest}" if b else f"({n}{rest[0]}){rest[1]}"] if n else []
    order = draw.pick(what, *orders, orders[0], "any", *merged)
    return _shuffled(draw, b + n + rest) if order == "any" else order


@dataclass
class _Heads:
    """How heads of keys and values meet those of queries.

    Attributes:
      q: Letters of query heads in the scores.
      kv: Letters of KV heads in the scores.
      stored_q, stored_kv: The same of the arguments.
    """

    q: str
    kv: str
    stored_q: str
    stored_kv: str
    how: str

    def queries(self, x: Named, sizes: dict[str, int]) -> Named:
        if self.how != "grouped":
            return x
        at = x.letters.index("n")
        shape = [*x.x.shape[:at], sizes["k"], sizes["g"], *x.x.shape[at + 1 :]]
        return Named(x.x.reshape(shape), x.letters.replace("n", "kg"))

    def keys(self, x: Named, sizes: dict[str, int]) -> Named:
        if self.how not in ("repeat", "broadcast", "tile", "spread"):
            return x
        at, G = x.letters.index("k"), sizes["g"]
        letters = x.letters.replace("k", "n")
        if self.how == "repeat":
            return Named(jnp.repeat(x.x, G, axis=at), letters)
        if self.how == "tile":
            return Named(jnp.tile(x.x, [G if i == at else 1 for i in range(x.x.ndim)]), letters)
        shape = list(x.x.shape)
        if self.how == "spread":
            return Named(jnp.broadcast_to(x.x, [*shape[:at], sizes["n"], *shape[at + 1 :]]), letters)
        wide = jnp.broadcast_to(jnp.expand_dims(x.x, at + 1), [*shape[: at + 1], G, *shape[at + 1 :]])
        return Named(wide.reshape([*shape[:at], shape[at] * G, *shape[at + 1 :]]), letters)

    def results(self, x: Named, sizes: dict[str, int]) -> Named:
        """Grouped heads side by side again."""
        if self.how != "grouped":
            return x
        ordered = Named(x.to(_beside(x.letters)), _beside(x.letters))
        at = ordered.letters.index("k")
        shape = [*ordered.x.shape[:at], sizes["n"], *ordered.x.shape[at + 2 :]]
        return Named(ordered.x.reshape(shape), ordered.letters.replace("kg", "n"))


def _beside(letters: str) -> str:
    return letters.replace("g", "").replace("k", "kg")


def draw_heads(draw: Draw) -> _Heads:
    how = draw.pick("heads", "mha", "mha", "repeat", "broadcast", "grouped", "grouped", "mqa", "tile", "spread", "none")
    if how == "spread":
        draw.sizes["k"], draw.sizes["g"] = 1, draw.sizes["n"]
    return {
        "mha": _Heads("n", "n", "n", "n", how),
        "grouped": _Heads("kg", "k", "n", "k", how),
        "mqa": _Heads("n", "", "n", "", how),
        "none": _Heads("", "", "", "", how),
    }.get(how, _Heads("n", "n", "n", "k", how))


def _rotated(x: Named, letter: str) -> Named:
    """Positions turned into queries or keys, halves against halves."""
    at, width = x.letters.index(letter), x.letters.index("h")
    half = x.x.shape[width] // 2
    shape = [1] * x.x.ndim
    shape[at], shape[width] = x.x.shape[at], half
    angle = (jnp.arange(shape[at])[:, None] * 0.1 ** jnp.arange(half)).astype(x.x.dtype)
    angle = jnp.transpose(angle) if width < at else angle
    angle = angle.reshape(shape)
    first, second = jnp.split(x.x, 2, axis=width)
    c, s = jnp.cos(angle), jnp.sin(angle)
    return Named(jnp.concatenate([first * c - second * s, second * c + first * s], axis=width), x.letters)


def sample(seed: int) -> Spelling:
    """One spelling; the same for the same seed."""
    draw = Draw(seed)
    nest = draw.pick(
        "nest", "none", "none", "jit", "remat", "inner jit", "vmap b", "vmap bn", "scan", "map", "vmap jit"
    )
    b = "" if draw.chance("no batch", 15) else "b"
    heads = draw_heads(draw)
    core = draw.pick("core", "one", "one", "one", "one", "mla sum", "mla concat", "mla absorbed") if b else "one"
    body = _body(draw, b, heads, core)
    fn, args = _nested(draw, nest, body)
    return Spelling(draw.name, fn, args)


def _core(
    draw: Draw, b: str, heads: _Heads, core: str
) -> Callable[[Sequence[Named]], tuple[list[Named], list[Named], Named, Any]]:
    """Queries, keys (two of each where scores are a sum), values, and what is done to the result."""
    sizes = draw.sizes
    if core == "mla absorbed":
        q, c = draw.arg(b + "t" + heads.stored_q + "h"), draw.arg(b + "sr")
        up_k = draw.arg((heads.stored_q or "") + "hr")
        up_v = draw.arg((heads.stored_q or "") + "re")
        qp, kp = draw.arg(b + "t" + heads.stored_q + "p"), draw.arg(b + "sp")
        is_one = draw.chance("one product", 50)

        def absorbed(args: Sequence[Named]) -> Any:
            n = heads.stored_q
            query = contract("einsum", args[q], args[up_k], b + "t" + n + "r")
            latent = args[c]
            queries, keys = [query, args[qp]], [latent, args[kp]]
            if is_one:
                queries = [Named(jnp.concatenate([query.x, args[qp].x], -1), query.letters)]
                keys = [Named(jnp.concatenate([latent.x, args[kp].x], -1), latent.letters)]

            def finish(out: Named) -> Named:
                return contract("einsum", out, args[up_v], out.letters.replace("r", "e"))

            return queries, keys, latent, finish

        return absorbed
    q_letters = _stored(draw, "q", b, heads.stored_q, "th")
    k_letters = _stored(draw, "k", b, heads.stored_kv, "sh")
    v_letters = _stored(draw, "v", b, heads.stored_kv, "se")
    q, k, v = draw.arg(q_letters), draw.arg(k_letters), draw.arg(v_letters)
    is_rotated = core == "one" and draw.chance("rotated", 20)
    extra = [draw.arg(b + "t" + heads.stored_q + "p"), draw.arg(b + "sp")] if core.startswith("mla") else []

    def plain(args: Sequence[Named]) -> Any:
        query, key, value = args[q], args[k], args[v]
        if is_rotated:
            query, key = _rotated(query, "t"), _rotated(key, "s")
        query, key, value = heads.queries(query, sizes), heads.keys(key, sizes), heads.keys(value, sizes)
        queries, keys = [query], [key]
        if extra:
            query_p, key_p = heads.queries(args[extra[0]], sizes), args[extra[1]]
            if core == "mla sum":
                queries, keys = [query, query_p], [key, key_p]
            else:
                wide = b + heads.kv
                shape = [*(key.x.shape[key.letters.index(c)] for c in wide + "s"), sizes["p"]]
                shared = jnp.broadcast_to(key_p.to(wide + "sp"), shape)
                both = b + heads.q
                queries = [Named(jnp.concatenate([query.to(both + "th"), query_p.to(both + "tp")], -1), both + "th")]
                keys = [Named(jnp.concatenate([key.to(wide + "sh"), shared], -1), wide + "sh")]
        return queries, keys, value, lambda out: out

    return plain


def _body(draw: Draw, b: str, heads: _Heads, core: str) -> Callable[[Sequence[Named]], Any]:
    if core == "mla absorbed":
        heads = _Heads(heads.stored_q, "", heads.stored_q, "", "mqa")
    operands = _core(draw, b, heads, core)
    is_flat = heads.how in ("mha", "repeat", "broadcast") and b == "b" and core == "one" and draw.chance("flat", 30)
    mask, masking = draw_mask(draw, b, heads.stored_q), draw_masking(draw)
    bias = draw_bias(draw, b, heads.stored_q)
    cap = draw.pick("cap", None, None, None, 5.0, 30.0)
    scale_q, scale_k, scale_s = _scaled(draw)
    n = heads.stored_q
    sink_place = draw.arg(n) if draw.chance("sinks", 15) else None
    softmax = draw_softmax(draw, sink_place is not None, is_safe=True)
    is_wide = draw.chance("f32 softmax", 60) if draw.dtype == "bfloat16" else False
    is_early = draw.chance("cast operands", 20)
    qk, pv = (draw.pick(what, "einsum", "matmul", "dot_general", "multiply") for what in ("qk", "pv"))
    head_letters = "f" if is_flat else heads.q
    batch = "" if is_flat else b
    orders = [batch + head_letters + "ts", batch + head_letters + "st", batch + "t" + head_letters + "s"]
    score_letters = draw.pick("scores", orders[0], orders[0], *orders)
    value_letter = "r" if core == "mla absorbed" else "e"
    outs = [batch + "t" + head_letters + value_letter, batch + head_letters + "t" + value_letter]
    out_letters = draw.pick("out", *outs)
    is_merged = not is_flat and b + n == "bn" and draw.chance("merged out", 40)
    sizes = draw.sizes

    def flat(x: Named) -> Named:
        """Batch and heads as one dimension; what lacks one of them is repeated along it."""
        if not is_flat or not set(x.letters) & {"b", "n"}:
            return x
        rest = x.letters.replace("b", "").replace("n", "")
        wide = [sizes["b"], sizes["n"], *(x.x.shape[x.letters.index(c)] for c in rest)]
        whole = jnp.broadcast_to(x.to("bn" + rest), wide)
        return Named(whole.reshape([-1, *whole.shape[2:]]), "f" + rest)

    def fit(x: Named) -> Named:
        return heads.queries(x, sizes) if "n" in x.letters else x

    def run(args: Sequence[Named]) -> Any:
        queries, keys, value, finish = operands(args)
        if is_early:
            queries, keys = ([x.map(lambda a: a.astype(jnp.float32)) for x in xs] for xs in (queries, keys))
        score: Named | None = None
        for query, key in zip(queries, keys, strict=True):
            part = contract(qk, flat(query).map(scale_q), flat(key).map(scale_k), score_letters)
            score = part if score is None else Named(score.x + part.x, score_letters)
        assert score is not None
        if is_wide:
            score = score.map(lambda x: x.astype(jnp.float32))
        score = score.map(scale_s)
        if cap is not None:
            score = score.map(lambda x: jnp.tanh(x / cap) * cap)
        if bias is not None:
            added = flat(fit(bias(args)))
            score = Named(score.x + added.to(score.letters).astype(score.x.dtype), score.letters)
        if mask is not None:
            score = masking(score, flat(fit(mask(args))))
        sinks = None if sink_place is None else flat(fit(args[sink_place]))
        seen = flat(value)
        out = softmax(score, sinks, lambda w: contract(pv, w.map(lambda x: x.astype(seen.x.dtype)), seen, out_letters))
        out = finish(out)
        if is_flat:
            return out.x
        out = heads.results(out, sizes)
        if is_merged:
            whole = out.to("btn" + out.letters[-1] if out.letters[-1] in "eh" else "btne")
            return whole.reshape(*whole.shape[:2], -1)
        return out.x

    return run


# ------------------------------------------------------------------------------------------------ around it
def _nested(
    draw: Draw, nest: str, body: Callable[[Sequence[Named]], Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    letters = list(draw.letters)
    args = tuple(draw.args)

    def plain(*xs: Any) -> Any:
        return body([draw.read(x, names) for x, names in zip(xs, letters, strict=True)])

    wrappers: dict[str, Callable[[Any], Any]] = {"jit": jax.jit, "remat": jax.checkpoint}
    if nest in wrappers:
        return wrappers[nest](plain), args
    if nest == "inner jit":
        return lambda *xs: jax.checkpoint(jax.jit(plain))(*xs) * 1.5, args
    if nest.startswith("vmap"):
        outer = [0 if i % 3 != 2 else None for i in range(len(args))]
        if all(a is None for a in outer):
            outer[0] = 0
        stacked = tuple(
            x if a is None else _stack(draw, i, 2) for i, (x, a) in enumerate(zip(args, outer, strict=True))
        )
        inner = jax.jit(plain) if nest == "vmap jit" else plain
        mapped = jax.vmap(inner, in_axes=tuple(outer))
        if nest == "vmap bn":
            return jax.vmap(mapped, in_axes=(0, *([None] * (len(args) - 1)))), (
                _stack(draw, 0, 3, stacked[0]),
                *stacked[1:],
            )
        return mapped, stacked
    if nest == "scan":
        stacked = tuple(_stack(draw, i, 2) for i in range(len(args)))

        def layers(*xs: Any) -> Any:
            def step(carry: Any, layer: Any) -> Any:
                out = plain(layer[0] + carry * 0.125, *layer[1:])
                return jnp.mean(out).astype(carry.dtype), out

            return lax.scan(step, jnp.zeros((), xs[0].dtype), xs)

        return layers, stacked
    if nest == "map":
        stacked = tuple(_stack(draw, i, 2) for i in range(len(args)))
        return lambda *xs: lax.map(lambda layer: plain(*layer), xs), stacked
    return plain, args


def _stack(draw: Draw, place: int, num: int, x: Any = None) -> Any:
    """Several like an argument: anew where it was drawn at random, else the same."""
    x = draw.args[place] if x is None else x
    if place not in draw.drawn:
        return np.stack([x] * num)
    return np.stack([x, *(np.asarray(draw.random.randn(*x.shape), x.dtype) for _ in range(num - 1))])
