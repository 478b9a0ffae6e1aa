"""`fastgpt doctor`: true of this machine, and unharmed by packages that are missing, broken or deadly."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jax
import pytest

from fastgpt_jax.cli import artifact_check, doctor, packages
from fastgpt_jax.cli.findings import ArtifactCheck
from fastgpt_jax.cli.machine import read_machine
from fastgpt_jax.cli.packages import OPTIONAL, REQUIRED, Probed, probe_all
from fastgpt_jax.cli.probe import DEVICES, KERNELS
from fastgpt_jax.kernels.cpu import library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Puts modules of the given texts on the path of child processes."""

    def make(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


@pytest.fixture
def probed(monkeypatch):
    """Replaces what the probes find: everything is usable except what is named."""

    def set_found(**exceptions):
        def probe(names):
            found = {name: Probed(**exceptions.get(name, {})) for name in names}
            device = {"platform": "tpu", "kind": "TPU v5", "memory_bytes": 2**34}
            return {DEVICES: Probed(devices=(device,) * 4), **{k: v for k, v in found.items() if k != DEVICES}}

        monkeypatch.setattr(doctor, "probe_all", probe)

    return set_found


def test_a_package_that_kills_its_process_is_the_only_one_that_is_lost(modules):
    modules(
        fine="print('{}', flush=True)",  # on a line of its own, as a probe's result would be
        deadly="import os\nos.abort()",
        leaving="raise SystemExit(3)",
        wrong="import no_such_module_at_all",
        last="",
    )
    found = probe_all(["fine", "deadly", "leaving", "wrong", "absent_module", "last"])
    assert [name for name, one in found.items() if one.is_usable] == ["fine", "last"]
    assert "signal 6" in found["deadly"].error
    assert found["leaving"].error == "SystemExit: 3"
    assert found["wrong"].error == "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    assert found["absent_module"].is_missing and found["absent_module"].error is None


def test_a_package_that_hangs_is_left_behind(modules):
    modules(hanging="import time\ntime.sleep(60)", last="")
    found = probe_all(["hanging", "last"], timeout_s=0.7)
    assert found["hanging"].error == "it did not finish importing in 1 s" and found["last"].is_usable


def test_devices_are_those_of_jax():
    found = probe_all(["jax", DEVICES])[DEVICES].devices
    assert {device["platform"] for device in found} == {jax.devices()[0].platform}


def test_the_report_says_what_is_broken_and_still_succeeds(probed, capsys):
    probed(torch={"error": "ImportError: libtorch.so"}, transformers={"is_missing": True})
    assert doctor.main([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"^  torch .*broken: ImportError: libtorch.so", out, re.MULTILINE)
    assert re.search(r"^  transformers +not installed", out, re.MULTILINE)
    assert re.search(r"^  tpu  TPU v5  x 4  16 GiB each$", out, re.MULTILINE)
    assert out.endswith("problems\n  torch: ImportError: libtorch.so\n")


def test_the_report_says_what_missing_kernels_cost(probed, capsys):
    probed(**{KERNELS: {"error": "they were not built"}})
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  kernels +XLA only$", out, re.MULTILINE)
    assert out.endswith("quantized and bfloat16 models are many times slower on CPU: they were not built\n")


def test_the_report_names_the_instructions_of_the_kernels(probed, capsys):
    probed(**{KERNELS: {"version": "avx2"}})
    assert doctor.main([]) == 0
    assert re.search(r"^  kernels +native, avx2$", capsys.readouterr().out, re.MULTILINE)


def test_kernels_are_those_of_the_library():
    found = probe_all([KERNELS])[KERNELS]
    reason = library.unusable_reason()
    assert found.error == reason and (found.version == library.isa() if reason is None else not found.version)


def test_a_missing_requirement_is_a_problem(probed, capsys):
    probed(flax={"is_missing": True})
    assert doctor.main([]) == 0
    assert "\n  flax is not installed; install the project again\n" in capsys.readouterr().out


def test_json_is_one_object(probed, capsys):
    probed(jax={"error": "boom"})
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["jax"] == {"version": jax.__version__, "is_usable": False, "error": "boom"}
    assert found["problems"] == ["jax: boom"] and len(found["devices"]) == 4


def test_required_packages_are_those_of_the_project():
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(re.split("[<>=]", name)[0] for name in names) == sorted(REQUIRED)
    assert not set(REQUIRED) & set(OPTIONAL)


def write_machine(root, cgroup, **files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/cpuinfo").write_text(
        "model name : Some CPU\nflags : fpu avx2 avx512f amx_int8\n\nmodel name : other\n"
    )
    (root / "proc/meminfo").write_text("MemTotal:  2048 kB\nMemAvailable: 1024 kB\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_limit_of_a_container_is_the_least_of_its_groups(tmp_path):
    files = {
        "memory-max": "9999\n",
        "a__memory-max": "4096\n",
        "a__b__memory-max": "max\n",
        "a__cpu-max": "50000 100000\n",
    }
    write_machine(tmp_path, "0::/a/b\n", **files)
    found = read_machine(tmp_path)
    assert found.memory_limit_bytes == 4096 and found.usable_cores == 0.5
    assert found.cpu_model == "Some CPU" and found.cpu_features == ("avx2", "avx512f", "amx_int8")
    assert (found.memory_bytes, found.available_bytes) == (2**21, 2**20)


def test_the_older_control_groups_are_read_too(tmp_path):
    files = {
        "memory__x__memory-limit_in_bytes": "8192",
        "memory__memory-limit_in_bytes": str(2**63 - 4096),
        "cpu__x__cpu-cfs_quota_us": "25000",
        "cpu__x__cpu-cfs_period_us": "100000",
    }
    write_machine(tmp_path, "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n", **files)
    found = read_machine(tmp_path)
    assert found.memory_limit_bytes == 8192 and found.usable_cores == 0.25


def test_a_group_without_a_limit_sets_none(tmp_path):
    write_machine(tmp_path, "4:memory:/\n", **{"memory__memory-limit_in_bytes": str(2**63 - 4096)})
    assert read_machine(tmp_path).memory_limit_bytes is None


def test_a_machine_that_tells_nothing_is_no_failure(tmp_path, probed, monkeypatch, capsys):
    found = read_machine(tmp_path)
    assert (found.cpu_model, found.cpu_features, found.memory_limit_bytes, found.memory_bytes) == (None, (), None, None)
    probed()
    monkeypatch.setattr(doctor, "read_machine", lambda: found)
    assert doctor.main([]) == 0 and "not known" in capsys.readouterr().out


def test_the_probe_script_needs_nothing_but_python(modules):
    modules(absl="raise RuntimeError", jax="raise RuntimeError('no jax')")
    found = packages.probe_all(["absl", DEVICES])
    assert found["absl"].error == "RuntimeError" and found[DEVICES].error == "RuntimeError: no jax"


def test_a_wrong_flag_is_one_line(capsys):
    assert doctor.main(["--artifat", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def checked(monkeypatch, probed):
    """Replaces the check of an artifact by its outcome."""

    def set_outcome(**outcome):
        probed()
        monkeypatch.setattr(artifact_check, "check_artifact", lambda path: ArtifactCheck(path, **outcome))

    return set_outcome


def test_a_corrupt_artifact_is_exit_2(checked, capsys):
    checked(error="out/weights/0.safetensors is corrupt")
    assert doctor.main(["out"]) == 2
    assert "\n  error  out/weights/0.safetensors is corrupt\n" in capsys.readouterr().out
    assert doctor.main(["--artifact", "out", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["artifact"]["error"] == "out/weights/0.safetensors is corrupt"


def test_another_environment_is_a_warning_a_field(checked, capsys):
    facts = {"model": "m", "num_entry_points": 5, "num_bytes": 2048, "verified_s": 0.5}
    checked(mismatches=("jaxlib is 2, made with 1", "device_count is 1, made for 2"), **facts)
    assert doctor.main(["out"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^  warning +(?:jaxlib|device_count) is ", out, re.MULTILINE)) == 2
    assert "fingerprint  not run" in out


def test_a_broken_jax_means_no_check_and_no_traceback(probed, capsys):
    probed(jax={"error": "ImportError: libdevice"})
    assert doctor.main(["out"]) == 2
    assert "  error  cannot be checked: ImportError: libdevice\n" in capsys.readouterr().out


def test_what_is_no_artifact_is_exit_2(probed, tmp_path, capsys):
    probed()
    for path in (tmp_path, tmp_path / "nowhere"):
        assert doctor.main([str(path)]) == 2
        assert re.search(r"^  error  .*(no artifact|no such artifact)", capsys.readouterr().out, re.MULTILINE)
