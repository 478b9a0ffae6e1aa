"""`import fastgpt_jax` is lazy, complete, and says when another module has the name of a package of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt_jax

ROOT = Path(fastgpt_jax.__file__).resolve().parent.parent


@pytest.mark.parametrize("name", fastgpt_jax.__all__)
def test_every_public_name_is_found(name):
    assert getattr(fastgpt_jax, name).__name__ == name and name in dir(fastgpt_jax)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match="LLM, CompileConfig"):
        _ = fastgpt_jax.LLMs


def run_python(code: str, *, cwd: Path) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.append({str(ROOT)!r}); {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = "import fastgpt_jax; print([m for m in ('jax', 'numpy', 'flax', 'passes') if m in sys.modules])"
    assert run_python(code, cwd=tmp_path).stdout == "[]\n"


def test_serving_a_compiled_model_imports_no_compiler(tmp_path):
    heavy = ("flax", "optax", "orbax", "transformers", "fastgpt_jax.compiler", "fastgpt_jax.models", "passes")
    code = f"import fastgpt_jax; fastgpt_jax.LLM; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code, cwd=tmp_path).stdout == "[]\n"


@pytest.mark.parametrize("name", ["passes.py", "sharding/__init__.py"])
def test_a_module_that_shadows_ours_is_named_with_its_place(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    done = run_python("import fastgpt_jax", cwd=tmp_path)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError") and str(tmp_path / name) in message and str(ROOT) in message
