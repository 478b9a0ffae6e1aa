"""`fastgpt compile` and what serves its artifacts: plans, tables, refusals, interrupts, and no compiler at serving."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgpt_jax.artifact.manifest import read_manifest, write_manifest
from fastgpt_jax.cli import compile as tool
from fastgpt_jax.cli import generate
from fastgpt_jax.cli.artifact_check import check_artifact
from fastgpt_jax.cli.progress import BuildProgress
from fastgpt_jax.compiler.build import Event

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import numpy as np, jax, jax.numpy as jnp

def model(p, tokens):
    x = p["embed"][tokens]
    mask = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, x @ p["q"] @ x.swapaxes(1, 2), -1e9))
    return (x + weights @ x @ p["v"]) @ p["embed"].T

def make_model(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return model, {"embed": draw((32, 8), "f4"), "q": draw((8, 8), "f4"), "v": draw((8, 8), "f4")}
"""
HEAVY = (
    "fastgpt_jax.compiler",
    "fastgpt_jax.checkpoint",
    "fastgpt_jax.models",
    "flax",
    "optax",
    "orbax",
    "transformers",
)
SERVE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if any(name == heavy or name.startswith(heavy + ".") for heavy in {HEAVY}):
            raise RuntimeError("serving imports " + name)

sys.meta_path.insert(0, Refuse())
from fastgpt_jax.cli.main import main
sys.exit(main(["generate", *sys.argv[1:]]))
"""
PROMPT = ("--prompt_ids", "1,2,3", "--max_tokens", "6", "--temperature", "0")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a small model of a user's own, and its artifact: made once for all workers, to be left as it is."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "printed.txt").exists():
            (folder / "model.py").write_text(MODEL)
            process = start(folder, "out")
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            (folder / "printed.txt").write_text(out)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy of it."""
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def arguments(folder, output, *flags):
    model = ("--model", f"{folder}/model.py:make_model", "--output", str(folder / output))
    return (*model, "--max_model_len", "16", "--max_num_seqs", "1", "--buckets", "8", *flags)


def start(folder, output, *flags):
    """Starts the tool as a user would, at a terminal: a test run in the background may ignore interrupts."""
    command = [sys.executable, str(ROOT / "tools/compile.py"), *arguments(folder, output, *flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts
    )


def _heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_tables_name_every_entry_point_and_pass(built):
    printed = (built / "printed.txt").read_text()
    for name in ("decode-r1-greedy", "decode-r1-full", "prefill-r1-c8-greedy", "prefill-r1-c8-full-score"):
        work = r"[\d.]+ K +[\d.]+ K +[\d.]+ \w+ +[\d.]+ \w+"
        assert re.search(rf"^{name} +{work} +[\d.]+ \w+ +[\d.]+ s +[\d.]+ KiB$", printed, re.MULTILINE)
    assert re.search(r"^simplify +exact +\d+ +\d+ +.*->", printed, re.MULTILINE)
    assert f"fastgpt generate --model {built / 'out'} --prompt_ids 1,2,3" in printed


def continue_greedily(tokens, num_tokens):
    """What greedy decoding must give, by the full forward."""
    names = {}
    exec(MODEL, names)  # noqa: S102 - the text above
    model, params = names["make_model"]()
    tokens = list(tokens)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(model(params, np.asarray([tokens]))[0, -1])))
    return tokens[-num_tokens:]


def test_a_process_without_the_compiler_serves_the_same_tokens(built):
    command = [sys.executable, "-c", SERVE, "--model", str(built / "out"), *PROMPT]
    served = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    expected = ",".join(map(str, continue_greedily([1, 2, 3], 6)))
    assert (served.returncode, served.stdout) == (0, expected + "\n"), served.stderr
    assert "loaded" in served.stderr


def test_flags_that_the_artifact_contradicts_are_one_line(folder, capsys):
    for flags, message in [
        (("--params", "x"), "holds its own weights"),
        (("--dtype", "bfloat16"), "decided when a model is compiled"),
        (("--tokenizer", "x"), "decided when a model is compiled"),
        (("--max_model_len", "8"), "max_model_len=8, but the model was compiled for 16"),
        (("--max_num_seqs", "4"), "max_num_seqs=4, but the model was compiled for 1"),
        (("--prompt", "text"), "no tokenizer"),
    ]:
        assert generate.main(["--model", str(folder / "out"), "--nofingerprint", *PROMPT, *flags]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("loaded")]
        assert out == "" or flags[0] == "--prompt"
        assert len([line for line in lines if message in line]) == 1, (flags, err)


def test_flags_of_artifacts_are_refused_for_other_models(folder, capsys):
    for flag in ("--verify=full", "--on_mismatch=refuse", "--nofingerprint"):
        assert generate.main(["--model", f"{folder}/model.py:make_model", *PROMPT, flag]) == 2
        err = capsys.readouterr().err
        assert "is for artifacts" in err and len(err.splitlines()) == 1


def change_environment(folder, manifest, **fields):
    """Makes the artifact one of another environment, with a digest that holds."""
    environment = dataclasses.replace(manifest.environment, **fields)
    write_manifest(folder / "out", dataclasses.replace(manifest, environment=environment))


def stop_deriving(monkeypatch):
    """Ends the tool where its work would begin."""

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "compile_model", interrupt)


def test_an_output_of_another_environment_is_named_and_refused_or_replaced(folder, monkeypatch, capsys):
    change_environment(folder, read_manifest(folder / "out"), jaxlib="0.0.1")
    assert tool.main(arguments(folder, "out", "--on_mismatch=refuse")) == 2
    err = capsys.readouterr().err
    assert "jaxlib is" in err and "0.0.1" in err and len(err.splitlines()) == 1
    assert generate.main(["--model", str(folder / "out"), *PROMPT, "--on_mismatch=refuse"]) == 2
    assert "0.0.1" in capsys.readouterr().err
    stop_deriving(monkeypatch)
    assert tool.main(arguments(folder, "out")) == 130
    assert re.search(r"^replacing .*out, which was compiled for .*0\.0\.1", capsys.readouterr().err, re.MULTILINE)


def test_a_corrupt_artifact_is_replaced_when_asked_and_said_so(folder, monkeypatch, capsys):
    (folder / "out/manifest.json").write_text("{}")
    stop_deriving(monkeypatch)
    assert tool.main(arguments(folder, "out")) == 2
    assert "replace it by --overwrite" in capsys.readouterr().err
    assert tool.main([*arguments(folder, "out"), "--overwrite"]) == 130
    assert re.search(r"^replacing what is there: .*is corrupt", capsys.readouterr().err, re.MULTILINE)


def test_the_artifact_of_another_model_is_not_replaced_unasked(folder, capsys):
    (folder / "other.py").write_text(MODEL)
    before = (folder / "out/manifest.json").read_bytes()
    argv = [word.replace("model.py", "other.py") for word in arguments(folder, "out")]
    assert tool.main(argv) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert (folder / "out/manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--passes", "nope"), "got 'nope'"),
        (("--stop_after", "dce"), "stop_after must name a pass"),
        (("--print_ir_after", "dce"), "print_ir_after must name a pass"),
        (("--buckets", "8,x"), "--buckets must be whole numbers from 1"),
        (("--buckets", "0"), "--buckets must be whole numbers from 1"),
        (("--buckets", ""), "--buckets must be whole numbers from 1"),
        (("--buckets", "64"), "--buckets must be at most the 16 tokens"),
        (("--decode_buckets", "2"), "--decode_buckets must be at most --max_num_seqs=1, got 2"),
        (("--max_num_seqs", "0"), "--max_num_seqs=0"),
        (("--bisect_limit", "-1"), "--bisect_limit=-1"),
        (("--on_invalid", "ignore"), "--on_invalid=ignore"),
        (("--verify", "some"), "<auto|full|fast|none>"),
        (("--traffic", "/nowhere.json"), "cannot read /nowhere.json"),
        (("--output", "/dev/null"), "/dev/null is a file"),
        (("--output", "/dev/null/x"), "/dev/null is no folder"),
        (("--output", str(ROOT)), "is no artifact"),
        (("--model", "/nowhere"), "no such folder"),
        (("--dtype", "bfloat16"), "--dtype is for model folders"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(tmp_path, capsys, flags, message):
    (tmp_path / "model.py").write_text(MODEL)
    assert tool.main(arguments(tmp_path, "out", *flags)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["model.py"]


def test_a_function_needs_a_length(tmp_path, capsys):
    assert tool.main(["--model", "m.py:f", "--output", str(tmp_path / "out")]) == 2
    assert "--max_model_len must be given for a function" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object"),
        ("{", "is not valid JSON"),
        ("{}", "it is empty"),
        ('{"prompts": {}}', "got 'prompts'"),
        ('{"concurrency": []}', "an object"),
        ('{"concurrency": {}}', "must have a count above 0"),
        ('{"prompt_tokens": {"5": 0}}', "must have a count above 0"),
        ('{"prompt_tokens": {"x": 1}}', "whole numbers from 1 as keys, in quotes, got 'x'"),
        ('{"prompt_tokens": {"0": 1}}', "got '0'"),
        ('{"prompt_tokens": {"5": 1, "05": 1}}', "got '05' again"),
        ('{"prompt_tokens": {"5": -1}}', "got -1 for '5'"),
        ('{"prompt_tokens": {"5": true}}', "got True for '5'"),
        ('{"prompt_tokens": {"5": NaN}}', "got nan for '5'"),
        ('{"prompt_tokens": {"5": 1e400}}', "got inf for '5'"),
    ],
)
def test_a_histogram_that_is_none_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "traffic.json").write_text(text)
    assert tool.main(arguments(tmp_path, "out", "--traffic", str(tmp_path / "traffic.json"))) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err


def test_the_plan_alone_writes_nothing_and_honours_the_traffic(folder, capsys):
    (folder / "traffic.json").write_text(json.dumps({"prompt_tokens": {"3": 9, "12": 1.5}, "concurrency": {"3": 1}}))
    flags = ("--plan_only", "--traffic", str(folder / "traffic.json"), "--buckets=auto", "--max_num_seqs=4")
    assert tool.main(arguments(folder, "plan", *flags)) == 0
    out = capsys.readouterr().out
    assert not (folder / "plan").exists()
    assert "prefill  8 x 1 or 4, 16 x 1 or 4 (tokens x requests); 53 % padding for the prompts of the traffic" in out
    assert "decode   3, 4 requests; 0 % padding for the concurrency of the traffic" in out
    assert re.search(r"^compile  16 entry points, about [\d.]+ s each, [\d.]+ s in all$", out, re.MULTILINE)


def stop_build(monkeypatch, error):
    """Replaces the build by one that fails behind two entry points."""

    def build(compiled, output, *, report, **rest):
        for done in (1, 2):
            report(Event("entry_point", f"step-{done}", done, 9, 0.5))
        raise error

    monkeypatch.setattr(tool, "build_artifact", build)


def test_an_interrupt_says_what_is_kept(folder, monkeypatch, capsys):
    stop_build(monkeypatch, KeyboardInterrupt())
    assert tool.main(arguments(folder, "stopped")) == 130
    err = capsys.readouterr().err
    assert "interrupted; 2 finished entry points are kept for the next run" in err and "Traceback" not in err


def test_a_full_disk_is_one_line(folder, monkeypatch, capsys):
    stop_build(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "x.bin"))
    assert tool.main(arguments(folder, "stopped")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    kept = "2 finished entry points are kept for the next run"
    assert last == f"fastgpt compile: cannot write x.bin: No space left on device; {kept}"


def test_progress_is_a_bar_at_a_terminal_and_lines_elsewhere(capsys):
    events = [
        Event("entry_point", "a", 1, 2, 1.25),
        Event("entry_point", "b", 2, 2, 0.0, True),
        Event("weights", "weights", 1024, 2048),
        Event("weights", "weights", 2048, 2048),
    ]
    for is_terminal in (False, True):
        with BuildProgress(is_terminal=is_terminal) as progress:
            for event in events:
                progress(event)
        err = capsys.readouterr().err
        if is_terminal:
            assert "2/2" in err and "2.05k/2.05k" in err and "\r" in err
        else:
            assert err.splitlines() == ["[1/2] a: 1.25 s", "[2/2] b: compiled before", "weights: 2 KiB"]


def test_the_doctor_checks_bytes_environment_and_fingerprint(folder):
    manifest = read_manifest(folder / "out")
    code = next((folder / "out/executables").iterdir())
    written = code.read_bytes()
    code.write_bytes(written[:-1] + b"?")
    assert "is corrupt" in check_artifact(str(folder / "out")).error
    code.write_bytes(written)
    change_environment(folder, manifest, device_kind="else")
    check = check_artifact(str(folder / "out"))
    assert check.error is None and "else" in check.mismatches[0] and not check.is_fingerprint_checked
    wrong = dataclasses.replace(manifest.fingerprint, top_logprobs=(0.0,) * len(manifest.fingerprint.top_logprobs))
    write_manifest(folder / "out", dataclasses.replace(manifest, fingerprint=wrong))
    assert "the fingerprint does not hold" in check_artifact(str(folder / "out")).error
    write_manifest(folder / "out", manifest)
    check = check_artifact(str(folder / "out"))
    assert (check.error, check.mismatches, check.is_fingerprint_checked) == (None, (), True)
    assert (check.model, check.num_entry_points) == ("model.py:make_model", 5)


@pytest.mark.slow
def test_what_is_compiled_already_is_found(folder, capsys):
    assert tool.main(arguments(folder, "out")) == 0
    num_programs = len(read_manifest(folder / "out").programs)
    assert num_programs > 5 and f"{num_programs} programs found compiled" in capsys.readouterr().out


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


@pytest.mark.slow
def test_an_interrupted_compile_leaves_no_artifact_and_goes_on_where_it_was(model_folder):
    process = start(model_folder, "out")
    while not (line := process.stderr.readline()).startswith("[2/"):
        assert line, "the tool ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and out == "" and "are kept for the next run" in err and "Traceback" not in err
    assert not (model_folder / "out").exists()
    assert generate.main(["--model", str(model_folder / "out"), *PROMPT]) == 2
    again = start(model_folder, "out")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert (
        int(re.search(r"(\d+) programs found compiled", out)[1]) >= 2
        and "[1/5] decode-r1-greedy: compiled before" in err
    )
    assert generate.main(["--model", str(model_folder / "out"), *PROMPT]) == 0


@pytest.mark.slow
def test_a_file_that_cannot_grow_ends_in_one_line_and_no_artifact(model_folder):
    resource = pytest.importorskip("resource")
    process = start(model_folder, "out")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and "Traceback" not in err
    assert "cannot write" in err.splitlines()[-1] and os.strerror(errno.EFBIG) in err.splitlines()[-1]
    assert not (model_folder / "out").exists()


@pytest.mark.slow
def test_programs_go_to_standard_error(model_folder):
    process = start(model_folder, "out", "--passes=canonicalize,dce", "--print_ir_after=dce", "--verify=full")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "after dce" in err and "after dce" not in out and "canonicalize" in out
