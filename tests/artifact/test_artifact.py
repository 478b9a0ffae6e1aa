"""An artifact serves what the compiler serves; damaged ones are refused, foreign ones named."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fastgpt_jax.artifact import weights as weights_module
from fastgpt_jax.artifact.digests import digest_bytes
from fastgpt_jax.artifact.entry_points import EntryPointKey
from fastgpt_jax.artifact.loading import is_artifact, load_artifact
from fastgpt_jax.artifact.manifest import CorruptArtifact, read_manifest, write_manifest
from fastgpt_jax.artifact.staging import Staging
from fastgpt_jax.artifact.verify import verify_artifact
from fastgpt_jax.compiler.build import Event, build_artifact
from fastgpt_jax.compiler.config import DEFAULT_PIPELINE
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.errors import UserError
from tests.artifact.built import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    SCORED,
    build,
    copy,
    flip,
    make_compiled,
    manifest_values,
    rewrite,
    tokens,
    with_environment,
)


@pytest.fixture(scope="module")
def compiled():
    return make_compiled()


@pytest.fixture(scope="module")
def report(compiled, tmp_path_factory):
    return build(tmp_path_factory.mktemp("artifact") / "small", compiled)


@pytest.fixture
def folder(report, tmp_path):
    return copy(report.output, tmp_path / "copy")


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SCORED], ids=["greedy", "sampled", "scored"])
def test_an_artifact_serves_what_the_compiled_model_serves(compiled, report, params):
    ours, theirs = LLM(str(report.output)), LLM(compiled)
    assert tokens(ours, params) == tokens(theirs, params)
    if params is SCORED:
        first, second = (
            llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False) for llm in (ours, theirs)
        )
        for a, b in zip(first, second, strict=True):
            for x, y in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True):
                assert {i: round(v.logprob, 5) for i, v in x.items()} == {i: round(v.logprob, 5) for i, v in y.items()}


def test_every_entry_point_is_there_and_described(compiled, report):
    entries = {entry.key: entry for entry in report.manifest.entry_points}
    assert set(entries) == set(compiled.buckets.keys())
    decode = entries[EntryPointKey(2, 2, "greedy", False)]
    assert decode.flops > 0 and decode.nbytes > 0 and decode.program.peak_bytes > 0 and decode.program.seconds > 0
    assert [p.name for p in decode.passes] == DEFAULT_PIPELINE.split(",") and decode.passes[0].matched > 0
    assert all(": runs as " in note for note in decode.passes[-1].notes) and decode.passes[-1].notes
    work = decode.program.work
    assert 0 < work.dot_flops <= decode.flops and 0 < work.nbytes < decode.nbytes and work.libraries
    names = [report.manifest.weights[i].name for i in decode.weights]
    assert "embed.embedding" in names and "layers.0.attention_norm.weight" in names


def test_weights_are_aligned_mapped_and_readable_by_others(report):
    manifest = report.manifest
    assert all(record.begin % 64 == 0 for record in manifest.weights)
    others = load_file(report.output / manifest.weights[0].file)
    artifact = load_artifact(report.output)
    for record, array in zip(manifest.weights, _weights(artifact), strict=True):
        np.testing.assert_array_equal(np.asarray(array), others[record.name])
        assert array.unsafe_buffer_pointer() % 64 == 0
    # Neighbours in the file are neighbours in memory: nothing was copied.
    first, second = _weights(artifact)[:2]
    distance = second.unsafe_buffer_pointer() - first.unsafe_buffer_pointer()
    assert distance == manifest.weights[1].begin - manifest.weights[0].begin


def _weights(artifact):
    """The arrays of the manifest's table, in its order."""
    found = {}
    for entry in artifact.manifest.entry_points:
        found.update(zip(entry.weights, artifact.steps.get(entry.key).weights, strict=True))
    return [found[i] for i in range(len(artifact.manifest.weights))]


def test_one_flipped_byte_in_any_file_is_refused_and_named(report, folder):
    pristine = {path: path.read_bytes() for path in sorted(p for p in folder.rglob("*") if p.is_file())}
    assert len(pristine) == len(report.manifest.files) + 2
    before = tokens(LLM(str(folder)))
    for index, (path, data) in enumerate(pristine.items()):
        flip(path, 1 + index * 7919)
        for on_mismatch in ("recompile", "refuse"):
            with pytest.raises(CorruptArtifact, match=path.name):
                load_artifact(folder, on_mismatch=on_mismatch)
        path.write_bytes(data)
    assert tokens(LLM(str(folder))) == before


def test_a_flipped_weight_passes_the_fast_check_alone(report, folder):
    flip(folder / report.manifest.weights[0].file, -1)
    assert verify_artifact(folder, "fast")[1] == "fast"
    with pytest.raises(CorruptArtifact, match="00000.safetensors"):
        verify_artifact(folder, "full")


@pytest.mark.parametrize("what", ["truncated", "missing", "unlisted", "a link", "no digest"])
def test_files_that_are_not_those_of_the_manifest_are_refused(folder, what):
    path = folder / "executables/init-state.bin"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "missing":
        path.unlink()
    elif what == "a link":
        path = folder / "executables/elsewhere"
        path.symlink_to(folder.parent)
    elif what == "no digest":
        path = folder / "manifest.sha256"
        path.unlink()
    else:
        path = folder / "executables/more.bin"
        path.write_bytes(b"")
    with pytest.raises(CorruptArtifact, match=path.name):
        load_artifact(folder)


@pytest.mark.parametrize(
    "field, value",
    [("jaxlib", "0.9.9"), ("device_kind", "abacus"), ("device_count", 999), ("cpu_features", ("avx1024",))],
)
def test_another_environment_is_named(report, folder, field, value):
    rewrite(folder, with_environment(report.manifest, **{field: value}))
    with pytest.raises(UserError, match=field) as refused:
        load_artifact(folder, on_mismatch="refuse")
    assert not isinstance(refused.value, CorruptArtifact) and "\n" not in str(refused.value)


@pytest.mark.parametrize("is_recompiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pages_are_moved_by_an_artifact_and_by_a_compiled_model(compiled, report, folder, is_recompiled):
    if is_recompiled:
        rewrite(folder, with_environment(report.manifest, jaxlib="0.9.9"))
    artifact = load_artifact(folder)
    assert set(artifact.manifest.transfers) == {"copy-pages", "read-pages", "write-pages"}
    size, num_pages = artifact.layout.transfer_pages, artifact.layout.num_pages
    first, second = np.full(size, num_pages, np.int32), np.full(size, num_pages, np.int32)
    first[:3], second[:3] = (1, 2, 3), (9, 8, 7)
    for model in (artifact, compiled):
        state = model.init_state()
        values = [np.random.default_rng(0).normal(size=x.shape).astype(x.dtype) for x in model.read_pages(state, first)]
        state = model.copy_pages(model.write_pages(state, first, values), first, second)
        for found, wanted in zip(jax.device_get(model.read_pages(state, second)), values, strict=True):
            axis = next(i for i, n in enumerate(found.shape) if n == size)
            np.testing.assert_array_equal(found.take([0, 1, 2], axis), wanted.take([0, 1, 2], axis))
        assert model.read_slot(state, 0) == [] and model.write_slot(state, 0, []) is state


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_another_environment_is_served_by_compiling_again(report, folder, params):
    fields = {"jaxlib": "0.9.9", "device_kind": "abacus", "device_count": 999, "cpu_features": ("avx1024",)}
    rewrite(folder, with_environment(report.manifest, **fields))
    lines = []
    artifact = load_artifact(folder, on_mismatch="recompile", tell=lines.append)
    assert len(lines) == 1 and all(field in lines[0] for field in fields)
    assert tokens(LLM(artifact), params) == tokens(LLM(str(report.output)), params)


def test_corruption_comes_before_the_environment(report, folder):
    rewrite(folder, with_environment(report.manifest, jaxlib="0.9.9"))
    flip(folder / report.manifest.entry_points[0].portable, 5)
    with pytest.raises(CorruptArtifact, match="portable"):
        load_artifact(folder, on_mismatch="recompile")


def test_a_program_that_computes_something_else_is_not_served(report, folder):
    expected = report.manifest.fingerprint
    changed = dataclasses.replace(expected, top_logprobs=tuple(x - 0.5 for x in expected.top_logprobs))
    rewrite(folder, dataclasses.replace(report.manifest, fingerprint=changed))
    with pytest.raises(UserError, match="fingerprint"):
        load_artifact(folder)
    load_artifact(folder, check_fingerprint=False)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m | {"format": 99}, "format 99"),
        (lambda m: m | {"surprise": 1}, "surprise"),
        (lambda m: {k: v for k, v in m.items() if k != "state"}, "state is missing"),
        (lambda m: m | {"buckets": {"prefill": [[8, "two"]], "decode": [2]}}, "prefill"),
        (lambda m: [m], "format None"),
    ],
)
def test_a_foreign_manifest_is_one_line(report, folder, change, words):
    data = json.dumps(change(manifest_values(report.manifest))).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sha256").write_text(f"{digest_bytes(data)}  manifest.json\n")
    with pytest.raises(UserError, match=words) as error:
        load_artifact(folder)
    assert "\n" not in str(error.value)


def test_the_manifest_survives_writing_and_reading(report, tmp_path):
    write_manifest(tmp_path, report.manifest)
    assert read_manifest(tmp_path) == report.manifest


def test_engine_arguments_that_contradict_an_artifact_are_refused(report, compiled):
    with pytest.raises(UserError, match="max_num_seqs=7"):
        LLM(str(report.output), max_num_seqs=7)
    with pytest.raises(UserError, match="verify must be one of"):
        LLM(str(report.output), verify="somewhat")
    with pytest.raises(UserError, match="are for artifacts"):
        LLM(compiled, verify="fast")


class Interrupt(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing_and_is_resumed(compiled, tmp_path):
    output = tmp_path / "made"

    def stop_after_two(event: Event) -> None:
        if event.kind == "entry_point" and event.done == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        build_artifact(compiled, output, name="small", report=stop_after_two)
    assert not output.exists()
    partial = tmp_path / ".made.partial"
    assert partial.is_dir() and not is_artifact(partial)
    with pytest.raises(UserError, match="never finished"):
        load_artifact(partial)
    # A damaged leftover is compiled again rather than used.
    flip(partial / "executables/decode-r2-full.bin", 100)
    report = build(output, compiled)
    assert report.reused == {"decode-r2-greedy"}
    assert not partial.exists() and tokens(LLM(str(output))) == tokens(LLM(compiled))
    again = build(output, compiled)
    others = {"init-state", "copy-pages", "read-pages", "write-pages"}
    assert {entry.key.name for entry in again.manifest.entry_points} | others == again.reused


@pytest.mark.slow
def test_a_build_beside_a_persistent_cache_makes_code_that_runs(tmp_path, compiled):
    """What comes out of JAX's cache cannot be serialized again on a CPU."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        build(tmp_path / "first", make_compiled())
        report = build(tmp_path / "second", make_compiled())
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    assert not report.reused and tokens(LLM(str(report.output))) == tokens(LLM(compiled))


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_artifact_as_it_was(compiled, report, folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "_write_file", full)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="No space left"):
        build(folder, compiled)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_only_artifacts_and_empty_folders_are_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is no artifact"):
        Staging(tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        Staging(tmp_path / "mine/thesis.txt")


def test_a_manifest_of_something_else_is_no_artifact(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is no artifact"):
        Staging(tmp_path / "site")
    with pytest.raises(UserError, match="name a folder in it"):
        Staging(Path("/"))


def test_a_link_to_an_artifact_stays_a_link(folder, report):
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    for _ in range(2):
        with Staging(link) as staging:
            shutil.copytree(report.output, staging.path, dirs_exist_ok=True)
            staging.publish()
        assert link.is_symlink() and load_artifact(link).manifest == report.manifest


def test_what_a_manifest_reads_must_be_its_files(report, folder):
    stranger = dataclasses.replace(report.manifest.weights[0], file="../stranger")
    rewrite(folder, dataclasses.replace(report.manifest, weights=(stranger, *report.manifest.weights[1:])))
    with pytest.raises(CorruptArtifact, match="stranger"):
        load_artifact(folder)
    beyond = dataclasses.replace(report.manifest.weights[0], begin=10**9)
    rewrite(folder, dataclasses.replace(report.manifest, weights=(beyond, *report.manifest.weights[1:])))
    with pytest.raises(CorruptArtifact, match="outside"):
        load_artifact(folder)


def test_two_builds_of_one_output_do_not_mix(tmp_path):
    with Staging(tmp_path / "made"), pytest.raises(UserError, match="another process"), Staging(tmp_path / "made"):
        pass


def test_a_writer_that_died_between_two_renames_is_repaired(folder):
    folder.rename(folder.with_name(".copy.previous"))
    with Staging(folder):
        assert is_artifact(folder)


FRESH = """
import sys
import jax, numpy as np
from fastgpt_jax import LLM, SamplingParams
from fastgpt_jax.artifact.loading import load_artifact
artifact = load_artifact(sys.argv[1])
first, second = np.arange(2 * artifact.layout.transfer_pages, dtype=np.int32).reshape(2, -1)
state = artifact.copy_pages(artifact.init_state(), first, second)
state = artifact.write_pages(state, first, jax.device_get(artifact.read_pages(state, second)))
llm = LLM(artifact)
out = llm.generate(prompt_token_ids=[[1, 2, 3], list(range(4, 14))], use_tqdm=False,
                   sampling_params=[SamplingParams(temperature=0, max_tokens=8),
                                    SamplingParams(seed=3, max_tokens=8, prompt_logprobs=2)])
print([list(o.outputs[0].token_ids) for o in out][0])
heavy = ("flax", "optax", "orbax", "transformers", "passes", "fastgpt_jax.compiler", "fastgpt_jax.models",
         "fastgpt_jax.checkpoint", "jax.experimental.pallas")
print([name for name in heavy if name in sys.modules])
"""
COUNTER = """
import atexit, sys
def install():
    from jax import monitoring
    events = []
    monitoring.register_event_duration_secs_listener(lambda name, *rest, **more: events.append(name))
    def report():
        work = ("jaxpr_trace", "jaxpr_to_mlir", "backend_compile")
        counted = [name for name in events if any(word in name for word in work)]
        print("COMPILE_EVENTS", len(counted), *sorted(set(counted)), file=sys.stderr)
    atexit.register(report)
install()
"""


def run_fresh(folder: Path, site: Path) -> subprocess.CompletedProcess:
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(COUNTER)
    root = Path(__file__).resolve().parents[2]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": f"{site}{os.pathsep}{root}"}
    return subprocess.run([sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, env=env)


def test_a_fresh_process_compiles_nothing_and_imports_nothing_heavy(report, tmp_path):
    done = run_fresh(report.output, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    served, heavy = done.stdout.splitlines()
    assert json.loads(served) == list(tokens(LLM(str(report.output)))[0]) and heavy == "[]"
    assert done.stderr.splitlines()[-1] == "COMPILE_EVENTS 0"


@pytest.mark.slow
def test_the_counter_counts(report, folder, tmp_path):
    rewrite(folder, with_environment(report.manifest, jaxlib="0.9.9"))
    done = run_fresh(folder, tmp_path / "site")
    assert done.returncode == 0 and int(done.stderr.splitlines()[-1].split()[1]) >= len(report.manifest.entry_points)


def test_a_moved_artifact_serves(folder, report):
    shutil.rmtree(folder.parent / "elsewhere", ignore_errors=True)
    moved = folder.rename(folder.parent / "elsewhere")
    assert tokens(LLM(str(moved))) == tokens(LLM(str(report.output)))


def test_what_is_served_does_not_change_with_the_folder(folder, report):
    artifact = load_artifact(folder)
    shutil.rmtree(folder / "executables")
    assert tokens(LLM(artifact), SAMPLED) == tokens(LLM(str(report.output)), SAMPLED)
