"""Writes OpenVINO's model of a folder: read from the float16 GGUF by OpenVINO GenAI, weights compressed by NNCF.

Needs the environment of the peers. The one idea: GenAI's own reader builds the stateful model that its pipeline
wants, so that no exporter is needed, and the compression is what OpenVINO's exporter applies by default: eight bits a
column with a zero point, or four bits in groups of 128, embedding and head in eight.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import openvino_genai as genai

GROUP_SIZE = 128
SETTINGS: dict[int, dict[str, Any]] = {
    8: {"mode": nncf.CompressWeightsMode.INT8_ASYM},
    4: {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": GROUP_SIZE, "ratio": 1.0},
}


def write_openvino(folder: Path, target: Path, bits: int) -> None:
    """Writes the model and what its pipeline reads beside it."""
    target.mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch, "f16.gguf")
        source.symlink_to((folder / "f16.gguf").resolve())
        # The reader writes what it made of the file beside the file.
        genai.LLMPipeline(str(source), "CPU", enable_save_ov_model=True)
        model = ov.Core().read_model(Path(scratch, "openvino_model.xml"))
        ov.save_model(nncf.compress_weights(model, **SETTINGS[bits]), target / "openvino_model.xml")
        for kind in ("openvino_tokenizer", "openvino_detokenizer"):
            for suffix in ("xml", "bin"):
                shutil.copy(Path(scratch, f"{kind}.{suffix}"), target)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(folder / "hf" / name, target)
