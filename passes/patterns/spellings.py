"""Small things that programs spell in several ways: squares, means, inverse square roots.

Knows no rule. The one idea: a pattern built of these matches every spelling at once.
"""

from __future__ import annotations

from passes.axes import size_of
from passes.patterns.pattern import Number, Pattern, Reduce, State, Where, apply


def power_of(x: Pattern, exponent: int) -> Pattern:
    """`x ** exponent` for 2 or 3: as a power or as products."""
    whole = apply("integer_pow", x, condition=lambda op: op.params["y"] == exponent)
    general = apply("pow", x, Number(float(exponent)))
    if exponent == 2:
        return apply("square", x) | apply("mul", x, x) | whole | general
    return whole | apply("mul", x, apply("mul", x, x)) | apply("mul", x, apply("square", x)) | general


def mean_of(x: Pattern, over: str) -> Pattern:
    """The mean along the axes called `over`: their sum divided by their number, or times its inverse."""
    total = Reduce("reduce_sum", x, over)
    count, part = f"{over}.count", f"{over}.part"

    def counts(state: State) -> bool:
        return _near(state.numbers[count], size_of(state.axes.expand(state.spans[over])))

    def parts(state: State) -> bool:
        return _near(state.numbers[part] * size_of(state.axes.expand(state.spans[over])), 1.0)

    divided = Where(apply("div", total, Number(name=count)), counts, f"a division by the size of {over}")
    scaled = Where(apply("mul", total, Number(name=part)), parts, f"a factor of one by the size of {over}")
    return divided | scaled


def _near(number: float, wanted: float) -> bool:
    return abs(number - wanted) <= 1e-6 * wanted


def divided_by_root(x: Pattern, square: Pattern) -> tuple[tuple[Pattern, ...], Pattern]:
    """`x / sqrt(square)`: as factors of a product that may hold more, and as a quotient."""
    root = apply("sqrt", square) | apply("pow", square, Number(0.5))
    inverse = (
        apply("rsqrt", square)
        | apply("div", Number(1.0), root)
        | apply("pow", square, Number(-0.5))
        | apply("integer_pow", root, condition=lambda op: op.params["y"] == -1)
    )
    return (x, inverse), apply("div", x, root)
