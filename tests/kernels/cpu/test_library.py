"""The native library: found, loaded, refused with a reason; its targets run under XLA."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from fastgpt_jax.kernels.cpu import library

pytestmark = pytest.mark.skipif(library.find() is None, reason="the native CPU kernels were not built")
SUM = jax.ShapeDtypeStruct((), np.uint32)


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_targets_run_under_xla():
    library.register()
    library.register()
    words = np.random.default_rng(0).integers(0, 2**32, 300_001, dtype=np.uint32)
    total = jax.jit(lambda x: jax.ffi.ffi_call("fastgpt_read_sum", SUM)(x))(words)
    assert int(total) == int(words.sum(dtype=np.uint32))


def test_an_unknown_instruction_set_is_refused():
    code = "from fastgpt_jax.kernels.cpu import library; print(library.unusable_reason())"
    said = run_python(code, FASTGPT_CPU_ISA="sse9").stdout
    assert "FASTGPT_CPU_ISA must be one of portable" in said and "got sse9" in said


def test_a_file_that_is_no_library_is_a_reason(tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"no library")
    loaded, reason = library._load(path)
    assert loaded is None and "cannot be loaded" in reason


def test_no_library_is_a_reason():
    loaded, reason = library._load(None)
    assert loaded is None and "were not built" in reason


def test_another_major_version_of_the_interface_is_a_reason(monkeypatch):
    monkeypatch.setattr(library, "_api_major", lambda: 7)
    loaded, reason = library._load(library.find())
    assert loaded is None and "jaxlib 7" in reason


@pytest.mark.slow
def test_without_a_compiler_the_build_warns_and_goes_on(tmp_path):
    root = tmp_path / "package"
    native = root / "fastgpt_jax/kernels/cpu/native"
    source = library.find().parent / "native"
    shutil.copytree(source, native)
    shutil.copy(source.parents[3] / "setup.py", root)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "NOT built" in done.stderr and "no-such-compiler" in done.stderr
    assert not list(root.rglob("*.so"))
