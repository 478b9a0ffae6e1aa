"""The kernels without JAX: under AddressSanitizer and UBSan, and as ARM code on an emulated processor."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "fastgpt_jax/kernels/cpu/native"
FLAGS = "-std=c++20 -ffp-contract=off -fno-math-errno -w -pthread".split()
SOURCES = [NATIVE / "harness.cc", NATIVE / "isa.cc", *NATIVE.glob("dot_*.cc")]


def build(tmp_path: Path, compiler: str, *flags: str) -> Path:
    made = tmp_path / "harness"
    subprocess.run([compiler, *FLAGS, *flags, f"-I{NATIVE}", *map(str, SOURCES), "-o", str(made)], check=True)
    return made


def run(command: list[str], isa: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"FASTGPT_CPU_ISA": isa}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    made = build(tmp_path, "g++", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = {isa: run([str(made)], isa) for isa in ("portable", "avx2", "avx512_vnni", "avx512_bf16")}
    ran = {isa: result for isa, result in done.items() if result.returncode != 2}  # 2: not on this processor.
    assert "portable" in ran
    assert {isa: result.stdout + result.stderr for isa, result in ran.items()} == {isa: f"{isa}: ok\n" for isa in ran}


@pytest.mark.slow
def test_arm_code_holds_the_same_contract(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    made = build(tmp_path, compiler, "-O2", "-static")
    for isa in ("portable", "neon_dot"):
        done = run([emulator, "-cpu", "max", str(made)], isa)
        assert done.stdout == f"{isa}: ok\n", done.stdout + done.stderr
