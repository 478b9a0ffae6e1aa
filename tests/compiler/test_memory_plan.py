"""How many pages there are for a share of the memory or a size; what cannot fit is refused with its numbers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

from fastgpt_jax.artifact import device_memory
from fastgpt_jax.artifact.device_memory import machine_memory_bytes
from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.artifact.manifest import read_manifest
from fastgpt_jax.cli import compile as tool
from fastgpt_jax.cli.common import to_options
from fastgpt_jax.compiler import memory_plan
from fastgpt_jax.compiler.build import build_artifact
from fastgpt_jax.compiler.compile import Compiled
from fastgpt_jax.compiler.compile import compile as compile_model
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.entry_point import compile_entry_point
from fastgpt_jax.compiler.memory_plan import MemoryPlan, format_bytes, parse_bytes, peak_bytes, plan_pages
from fastgpt_jax.errors import UserError
from fastgpt_jax.models import Llama
from tests.artifact.built import CONFIG, LLAMA
from tests.filled_model import make_filled_model

PLAN = MemoryPlan(
    limit_bytes=1000,
    share=0.9,
    weights_bytes=500,
    carried_bytes=50,
    temporary_bytes=100,
    page_bytes=30,
    request_pages=4,
)
LIMIT = 400_000
PAGE_BYTES = 5 * LLAMA.num_hidden_layers * 2 * LLAMA.num_key_value_heads * LLAMA.head_dim * 4


def test_pages_fill_what_is_left():
    assert PLAN.num_pages() == (900 - 650) // 30 == 8
    assert dataclasses.replace(PLAN, snapshot_bytes=100).with_peak(770, 4).num_pages() == (900 - 750) // 30
    with pytest.raises(
        UserError, match=r"^4 pages of 30 B, which one request of full length takes, and 700 B of weigh"
    ):
        dataclasses.replace(PLAN, weights_bytes=700).num_pages()
    with pytest.raises(UserError, match=r"^9 pages of 30 B and .* do not fit into 90% of 1000 B.*; raise gpu_memory_"):
        PLAN.check(9)
    with pytest.raises(UserError, match="do not fit into 0.01% of"):
        dataclasses.replace(PLAN, share=1e-4).check(1)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GiB", 2**31), ("500 MB", 500 * 10**6), ("1.5kb", 1500), ("4096", 4096), ("1B", 1)]
)
def test_sizes_have_units(text: str, nbytes: int):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "2 gallons", "-1GiB", "0", "nan", "0.1B"])
def test_other_sizes_are_one_line(text: str):
    with pytest.raises(UserError, match="2GiB or 500MB"):
        parse_bytes(text)


def test_bytes_are_shown_in_their_unit():
    assert [format_bytes(n) for n in (0, 7, 1024, 3 * 2**20, 2**41)] == ["0 B", "7 B", "1 KiB", "3 MiB", "2048 GiB"]


@pytest.mark.parametrize(
    "given", [{"num_pages": 4, "memory_pool_size": 10**6}, {"memory_pool_size": 10**6, "gpu_memory_utilization": 0.5}]
)
def test_pages_are_decided_once(given: dict):
    with pytest.raises(UserError, match="give one of them"):
        CompileConfig(**given)


def test_flags_of_the_compiler_decide():
    def config(*words: str) -> CompileConfig:
        values = tool.make_flags()
        values(["compile", "--model=folder", "--output=out", *words])
        return tool.make_config(to_options(values, tool.Options))

    found = config("--memory_pool_size=2MiB", "--page_size=16")
    assert (found.memory_pool_size, found.page_size, found.gpu_memory_utilization) == (2**21, 16, None)
    assert config("--gpu_memory_utilization=0.25").gpu_memory_utilization == 0.25
    with pytest.raises(UserError, match="gpu_memory_utilization must be above 0"):
        config("--gpu_memory_utilization=0")
    with pytest.raises(UserError, match="number of bytes with a unit"):
        config("--memory_pool_size=much")


@pytest.fixture(scope="module")
def small_pool() -> Compiled:
    config = dataclasses.replace(CONFIG, memory_pool_size=7 * PAGE_BYTES + 1)
    return compile_model(make_filled_model(Llama, LLAMA), config=config)


def planned(compiled: Compiled, **given) -> Compiled:
    """The model as it comes out of `compile` with other settings of the memory."""
    other = copy.copy(compiled)
    other.config, other.steps = dataclasses.replace(CONFIG, **given), {}
    other.program = dataclasses.replace(compiled.program, num_pages=plan_pages(other))
    return other


def give_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(memory_plan, "device_memory_bytes", lambda num_devices: nbytes)


def test_a_pool_of_a_size_has_the_pages_that_fit(small_pool: Compiled):
    layout = small_pool.layout
    assert layout.bytes_per_page == PAGE_BYTES and layout.num_pages == 7
    assert {x.shape[0] for x in small_pool.init_state()} == {7}
    with pytest.raises(
        UserError, match=r"holds 4 pages of .* one request of 24 tokens takes 5; give at least 6.25 KiB"
    ):
        planned(small_pool, memory_pool_size=5 * PAGE_BYTES - 1)


@pytest.mark.slow
def test_a_share_of_the_memory_is_filled(small_pool: Compiled, monkeypatch):
    give_memory(monkeypatch, LIMIT)
    compiled = planned(small_pool, gpu_memory_utilization=0.5)
    largest = EntryPointKey(2, 2, "full", False)  # in so small a model the sampler's inputs decide
    peak = peak_bytes(compile_entry_point(compiled.trace(largest)).compiled)
    assert LIMIT // 2 - 2 * PAGE_BYTES < peak <= LIMIT // 2, "by what XLA says of the step with all pages"


def test_what_cannot_hold_a_request_is_refused_before_anything_is_compiled(small_pool: Compiled, monkeypatch):
    give_memory(monkeypatch, 20_000)
    monkeypatch.setattr(memory_plan, "compile_entry_point", lambda traced: pytest.fail("compiled"))
    with pytest.raises(UserError, match="^5 pages of 1.25 KiB, which one request of full length takes, and .* weights"):
        planned(small_pool, gpu_memory_utilization=0.5)


@pytest.mark.slow
def test_what_was_compiled_is_checked_again(small_pool: Compiled, monkeypatch, tmp_path: Path):
    give_memory(monkeypatch, LIMIT)
    compiled = planned(small_pool, gpu_memory_utilization=0.5)
    num_pages = compiled.layout.num_pages
    give_memory(monkeypatch, LIMIT - 4 * PAGE_BYTES)
    with pytest.raises(UserError, match=f"^{num_pages} pages of .* do not fit into 50%"):
        build_artifact(compiled, tmp_path / "made", name="small")
    assert not (tmp_path / "made").exists()
    give_memory(monkeypatch, LIMIT)
    report = build_artifact(compiled, tmp_path / "made", name="small")
    assert {entry.key.name for entry in report.manifest.entry_points} <= report.reused, "kept by the build that failed"
    assert read_manifest(report.output).layout.num_pages == num_pages
    assert max(entry.program.peak_bytes for entry in report.manifest.entry_points) <= LIMIT // 2


def test_the_memory_of_a_machine_is_what_its_control_groups_allow(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(device_memory.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}[name])
    assert machine_memory_bytes(tmp_path) == 4_096_000
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/a/b/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("70000\n")
    assert machine_memory_bytes(tmp_path) == 70_000
    (tmp_path / "proc/self/cgroup").write_text("3:cpu:/x\n5:memory:/a\n")
    (tmp_path / "sys/fs/cgroup/memory/a").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/a/memory.limit_in_bytes").write_text("60000\n")
    assert machine_memory_bytes(tmp_path) == 60_000
