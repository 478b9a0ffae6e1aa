"""What a compile is asked to quantize: rules from a scheme's name or a file, and the pass that carries them out.

Knows no graph. The one idea: rules of the user's own come first, what they do not decide is the scheme's; a rule of the
user's that decides nothing is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from fastgpt_jax.compiler.kernel_choice import TARGET_PASSES, target_passes
from fastgpt_jax.errors import UserError
from passes.fusion.merge_projections import CutOf
from passes.graph import Graph
from passes.numerics import Numerics
from passes.quantization.quantize_weights import decided_sites, quantize_weights
from passes.quantization.rules import OPS, QuantizationRule, default_rules, unused_rules
from passes.quantization.schemes import SCHEMES, Scheme
from passes.registry import PASSES, Pass, make_registry, parse_pipeline
from passes.select import Target

PASS = "quantize_weights"
Rules = tuple[QuantizationRule, ...]


def scheme_named(name: str) -> Scheme:
    """A scheme.

    Raises:
      UserError: There is none of this name.
    """
    if name not in SCHEMES:
        raise UserError(f"quantization must be one of {', '.join(SCHEMES)}, got {name!r}")
    return SCHEMES[name]


def all_rules(scheme: str | None, rules: Rules) -> Rules:
    """The user's rules, then those of the scheme."""
    return (*rules, *(() if scheme is None else default_rules(scheme_named(scheme))))


def make_pipeline(
    text: str, scheme: str | None, rules: Rules, target: Target | None = None, cut_of: CutOf | None = None
) -> tuple[Pass, ...]:
    """The passes of a compile. Weights are quantized before what depends on the target, or where the text says.

    Args:
      target: What is compiled for; by default one device of JAX's default backend.
      cut_of: How its devices share each parameter, where there are several.

    Raises:
      ValueError: The text names an unknown pass.
    """
    known = {**PASSES, **target_passes(target or Target(jax.default_backend()), cut_of)}
    wanted = all_rules(scheme, rules)
    if not wanted:
        return parse_pipeline(text, known)
    used = dict.fromkeys(rule.scheme.name for rule in wanted if rule.scheme is not None)
    function = partial(_run, wanted)
    entry = Pass(PASS, function, Numerics.APPROXIMATE, is_counted=True, detail=", ".join(used))
    registry = make_registry([*known.values(), entry])
    names = [name.strip() for name in text.split(",") if name.strip()]
    if PASS not in names:
        at = next((i for i, name in enumerate(names) if name in TARGET_PASSES), len(names))
        names[at:at] = [PASS, "simplify"]
    return parse_pipeline(",".join(names), registry)


def _run(rules: Rules, graph: Graph, counter: Any) -> Any:
    return quantize_weights(graph, rules, counter)


def tell_unused(graph: Graph, paths: list[str], rules: Rules, *, is_strict: bool) -> str | None:
    """One line about the user's rules that decide about no weight of a model; None where each decides about some.

    Args:
      graph: The forward, whose first inputs are the parameters.

    Raises:
      UserError: There are some and `is_strict`.
    """
    for value, path in zip(graph.inputs, paths, strict=False):
        value.path = path
    unused = unused_rules(rules, decided_sites(graph))
    if not unused:
        return None
    line = f"quantization rules that are about no weight of the model: {'; '.join(map(str, unused))}"
    if is_strict:
        raise UserError(f"{line}; weights are named like {', '.join(repr(p) for p in paths[:2])}")
    return line


def read_rules(path: str | Path) -> Rules:
    """Rules from a JSON file: a list of objects with `pattern`, `scheme` (null for none) and, if need be, `op`.

    Raises:
      UserError: The file is not that.
    """
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(items, list) or not items:
        raise UserError(f"{path} must hold a list of quantization rules, got {_shown(items)}")
    return tuple(_rule(item, f"rule {i} of {path}") for i, item in enumerate(items))


def _rule(item: Any, where: str) -> QuantizationRule:
    if not isinstance(item, Mapping):
        raise UserError(f"{where} must be an object with pattern and scheme, got {_shown(item)}")
    unknown = [name for name in item if name not in ("pattern", "op", "scheme")]
    if unknown:
        raise UserError(f"{where} has an unknown field {unknown[0]!r}; there are pattern, op and scheme")
    missing = [name for name in ("pattern", "scheme") if name not in item]
    if missing:
        raise UserError(f"{where} must have a {missing[0]}")
    pattern, op, scheme = item["pattern"], item.get("op", "*"), item["scheme"]
    if not isinstance(pattern, str):
        raise UserError(f"{where} must have a regular expression as pattern, got {_shown(pattern)}")
    if op not in OPS:
        raise UserError(f"{where} must have an op of {', '.join(OPS)}, got {_shown(op)}")
    if scheme is not None and (not isinstance(scheme, str) or scheme not in SCHEMES):
        raise UserError(f"{where} must have a scheme of {', '.join(SCHEMES)} or null, got {_shown(scheme)}")
    try:
        return QuantizationRule(pattern, op, None if scheme is None else SCHEMES[scheme])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
