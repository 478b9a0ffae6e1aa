"""The X-ray as JSON: every field of its dataclasses, with the listing of one stage, for programs that read it."""

from __future__ import annotations

import dataclasses
import json

from fastgpt_jax.artifact.codec import encode
from fastgpt_jax.compiler.xray import XRay


def render_json(found: XRay, shown: str) -> str:
    """The X-ray with the listing of the stage `shown`; of the others the counts."""
    stages = [stage if stage.name == shown else dataclasses.replace(stage, listing=None) for stage in found.stages]
    return json.dumps(encode(dataclasses.replace(found, stages=tuple(stages))), indent=1)
