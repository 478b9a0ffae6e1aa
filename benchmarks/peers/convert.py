"""Makes files of engines for one shape: `python -m benchmarks.peers.convert SHAPE FOLDER NAME ...`.

`hf` needs what our environment has; all else is made in the peers' own.

The one idea: all begin from one folder of float32 weights, and each engine's own tool quantizes them, as its users
would. What is there already stays; each part is made beside its place and renamed, so that an interrupted run leaves
nothing half made.
"""

# ruff: noqa: PLC0415 - each part imports what its engine needs, and no environment has all of it

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers.shapes import SHAPES, Shape


def write_hf(shape: Shape, folder: Path, target: Path) -> None:
    from benchmarks.peers.write_model import write_model

    write_model(shape, target)


def write_f16(shape: Shape, folder: Path, target: Path) -> None:
    from benchmarks.peers.write_gguf import write_gguf

    write_gguf(shape, folder / "hf", target)


def write_quantized(format_name: str) -> Callable[[Shape, Path, Path], None]:
    """llama.cpp's quantization of the float16 file."""

    def write(shape: Shape, folder: Path, target: Path) -> None:
        from benchmarks.peers.write_gguf import quantize

        quantize(folder / "f16.gguf", target, format_name)

    return write


def write_openvino(bits: int) -> Callable[[Shape, Path, Path], None]:
    """OpenVINO's model of a Llama with weights compressed by NNCF."""

    def write(shape: Shape, folder: Path, target: Path) -> None:
        from benchmarks.peers.write_openvino import write_openvino

        write_openvino(folder, target, bits)

    return write


def write_ctranslate2(shape: Shape, folder: Path, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder / "hf")).convert(str(target), quantization="int8")


def write_bf16(shape: Shape, folder: Path, target: Path) -> None:
    """Torch's weights as they lie in memory, so that loading maps them."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "hf" / "model.safetensors")
    target.mkdir()
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, target / "model.safetensors")
    shutil.copy(folder / "hf" / "config.json", target)


PARTS: dict[str, Callable[[Shape, Path, Path], None]] = {
    "hf": write_hf,
    "f16.gguf": write_f16,
    "q8_0.gguf": write_quantized("q8_0"),
    "q4_0.gguf": write_quantized("q4_0"),
    "openvino-int8": write_openvino(8),
    "openvino-int4": write_openvino(4),
    "ctranslate2-int8": write_ctranslate2,
    "torch-bf16": write_bf16,
}


NEEDS: dict[str, tuple[str, ...]] = {
    "hf": (),
    "f16.gguf": ("hf",),
    "q8_0.gguf": ("f16.gguf",),
    "q4_0.gguf": ("f16.gguf",),
    "openvino-int8": ("f16.gguf",),
    "openvino-int4": ("f16.gguf",),
    "ctranslate2-int8": ("hf",),
    "torch-bf16": ("hf",),
}


def convert(shape: Shape, folder: Path, names: Sequence[str]) -> None:
    """Makes what is missing of these, and of what they are made from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        target, part = folder / name, folder / f"making-{name}"
        if target.exists():
            continue
        convert(shape, folder, NEEDS[name])
        _remove(part)
        start = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            PARTS[name](shape, folder, part)
        part.rename(target)
        print(f"{shape.name}: {name} made in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    convert(SHAPES[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:])
