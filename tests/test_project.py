"""Facts about the project as a whole: what is pinned, what importing costs, what survives `python -O`."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))


def normalized(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def pins(path: Path) -> set[str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!-]+", line) for line in lines), (
        "a constraint file holds pins and nothing else"
    )
    return {normalized(line) for line in lines}


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_dependency_is_pinned(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"], *extras["train"]]
    assert {normalized(w) for w in wanted} <= pins(path)


def test_goldens_are_made_with_pinned_versions():
    assert {"torch", "transformers"} <= pins(ROOT / "constraints" / "py311.txt")


def run_python(*args: str) -> str:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_leaves_load_without_the_pass_manager_or_flax():
    code = "import sys, passes.ops, passes.graph, sharding; print({'flax', 'passes.manager'} & sys.modules.keys())"
    assert run_python("-c", code).strip() == "set()"


def test_wrong_input_is_refused_under_python_O():
    code = (
        "import passes\n"
        "try: passes.apply(len, 'no_such_pass')\n"
        "except ValueError as error: print('refused' if not __debug__ else 'not optimized')"
    )
    assert run_python("-O", "-c", code).strip() == "refused"


def test_no_tool_shadows_a_module_of_python():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert "xray" in tools and not tools & sys.stdlib_module_names
