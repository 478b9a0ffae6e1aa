"""Which family a config.json belongs to.

The one idea: `architectures` decides where it is given, `model_type` where it is not, and what is not served is refused
with the name of the nearest that is.
"""

from __future__ import annotations

import difflib

from fastgpt_jax.checkpoint.bloom import BLOOM
from fastgpt_jax.checkpoint.family import Family
from fastgpt_jax.checkpoint.gemma import GEMMA2, GEMMA3
from fastgpt_jax.checkpoint.gpt2 import GPT2_FAMILY
from fastgpt_jax.checkpoint.llama import LLAMA, QWEN2
from fastgpt_jax.checkpoint.mistral import MISTRAL
from fastgpt_jax.checkpoint.phi3 import PHI3
from fastgpt_jax.checkpoint.qwen3 import QWEN3
from fastgpt_jax.errors import UserError
from fastgpt_jax.json_fields import Fields

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, MISTRAL, QWEN3, PHI3, GEMMA2, GEMMA3, GPT2_FAMILY, BLOOM)


def find_family(config: Fields) -> Family:
    """The family of a config.json.

    Raises:
      UserError: It names no architecture, or one that no family has.
    """
    architectures = config.values.get("architectures") or []
    by_architecture = {name: family for family in FAMILIES for name in family.architectures}
    by_model_type = {name: family for family in FAMILIES for name in family.model_types}
    if architectures:
        known, name = by_architecture, str(architectures[0] if isinstance(architectures, list) else architectures)
    else:
        known, name = by_model_type, config.string("model_type")
    if name in known:
        return known[name]
    lowered = {candidate.lower(): candidate for candidate in known}
    nearest = lowered[difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.0)[0]]
    raise UserError(
        f"{config.where} names the architecture {name!r}, which is not supported; the nearest supported one is "
        f"{nearest!r} (of {', '.join(known)}); another model can be given as module_or_file.py:make_model"
    )


def family_of(config: object) -> Family:
    """The family that writes a model configuration.

    Raises:
      UserError: No family does.
    """
    for family in FAMILIES:
        if isinstance(config, family.config_class):
            return family
    raise UserError(f"no Hugging Face layout is known for a {type(config).__name__}")
