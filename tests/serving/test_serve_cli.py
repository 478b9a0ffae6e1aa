"""`fastgpt serve`: flags and files become a server; what is wrong with them is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fastgpt_jax.artifact.manifest import MANIFEST
from fastgpt_jax.cli import compile as compile_tool
from fastgpt_jax.cli import serve
from fastgpt_jax.cli.main import main
from fastgpt_jax.cli.serve_artifact import find_or_compile
from fastgpt_jax.cli.serve_config import read_serve_config
from fastgpt_jax.cli.serve_flags import LIMITS, apply_config, make_flags, make_model_options, make_settings
from fastgpt_jax.engine.args import EngineArgs
from fastgpt_jax.engine.engine import LLMEngine
from fastgpt_jax.errors import UserError
from fastgpt_jax.serving.settings import ServerSettings
from tests.artifact.built import build
from tests.engine.fake import FakeCompiled

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
service: {port: 8123, batch_size: 16, max_length: 256}
hardware: {gpu_id: 0}
optimization: {precision: mixed}
"""


def parse(*words):
    values = make_flags()
    values(["serve", "--model=m", *words])
    return values


def write(folder, text, name="config.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_config_file_speaks_where_no_flag_does(tmp_path):
    values = parse("--port=9000")
    apply_config(values, read_serve_config(write(tmp_path, CONFIG)))
    options, settings = make_model_options(values), make_settings(values, "m")
    assert settings.port == 9000 and options.gpu_id == "0"
    assert options.compiled == {"max_num_seqs": 16, "max_model_len": 256, "dtype": "bfloat16"}


def test_the_example_is_read():
    values = parse()
    apply_config(values, read_serve_config(str(ROOT / "configs/serve.yaml")))
    options = make_model_options(values)
    assert options.compiled == {"max_num_seqs": 32, "max_model_len": 2048, "dtype": "float32"}
    assert options.compiling == {"memory_pool_size": "2GB"}


def test_a_config_file_may_be_python(tmp_path):
    text = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'service': {'port': 7}})\n"
    assert read_serve_config(write(tmp_path, text, "config.py")) == {"port": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("service: {ports: 1}", "unknown key 'service.ports'; did you mean service.port?"),
        ("model: x", "unknown key 'model'"),
        ("service: 8000", "service must be a group of keys"),
        ("service: {port: high}", "service.port must be a whole number"),
        ("service: {port: true}", "service.port must be a whole number"),
        ("optimization: {async_pipeline: 3}", "must be true or false"),
        ("- a", "must hold groups of keys"),
        ("a: [", "is no YAML file"),
    ],
)
def test_a_wrong_config_file_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match="config.yaml") as told:
        read_serve_config(write(tmp_path, text))
    assert message in str(told.value)


def test_every_limit_has_its_flag():
    settings = make_settings(parse("--max_queue_len=3", "--request_timeout_s=2.5", "--served_model_name=a"), "m")
    assert (settings.max_queue_len, settings.request_timeout_s, settings.model_name) == (3, 2.5, "a")
    others = {"served_model_names", "host", "port", "api_keys", "open_metrics", "cors_allow_origins", "log_format"}
    others |= {"ssl_certfile", "ssl_keyfile", "log_level", "control_port", "profile_folder"}
    assert set(ServerSettings.__dataclass_fields__) == {*LIMITS, *others}
    assert make_settings(parse(), "m") == ServerSettings(served_model_names=("m",)), (
        "the defaults are those of the class"
    )


def test_the_time_of_a_grammar_reaches_its_compiler(monkeypatch):
    def make_engine(args, **options):
        assert LLMEngine(FakeCompiled(), **options).forms.deadline_s == 1.5
        raise UserError("seen")

    monkeypatch.setattr(serve, "is_artifact", lambda folder: True)
    monkeypatch.setattr(serve, "make_engine_args", lambda *given: None)
    monkeypatch.setattr(LLMEngine, "from_engine_args", make_engine)
    flags = parse("--grammar_timeout_s=1.5")
    with pytest.raises(UserError, match="seen"):
        serve.load(make_model_options(flags), make_settings(flags, "m"))


def test_flags_of_the_engine():
    engine = make_model_options(parse("--swap_to_cpu", "--min_batch=2")).engine
    assert engine == {"min_batch": 2, "swap_space": 4 * 2**30}
    assert make_model_options(parse("--swap_space=0.5")).engine == {"swap_space": 2**29}
    assert make_model_options(parse("--seed=0", "--batch_timeout_ms=0")).engine == {"seed": 0, "batch_timeout_ms": 0}
    assert make_model_options(parse("--swap_to_cpu", "--swap_space=0")).engine == {"swap_space": 0}
    assert make_model_options(parse("--pin_buckets")).engine == {"pin_buckets": True}
    assert make_model_options(parse("--noenable_prefix_caching")).engine == {"enable_prefix_caching": False}
    assert make_model_options(parse("--num_workers=3")).num_workers == 3
    for name in make_model_options(parse("--swap_to_cpu", "--min_batch=2", "--gpu_memory_utilization=0.5")).engine:
        assert name in EngineArgs.__dataclass_fields__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=m", "--noasync_pipeline"], "async_pipeline=false is not supported"),
        (["--model=/nowhere"], "there is no model /nowhere"),
        ([], "--model must be given"),
        (["--model=m", "--port=70000"], "port must be between 0 and 65535"),
        (["--model=m", "--profile_folder=x"], "profile_folder needs control_port"),
        (["--model=m", "--pipeline_parallel_size=2"], "pipeline_parallel_size=2 is not supported"),
        (["--model=m", "--max_schema_bytes=65537"], "max_schema_bytes must be between 1 and 65536"),
        (["--model=m", "--max_n=0"], "max_n must be at least 1"),
        (["--model=m", "--request_timeout_s=nan"], "request_timeout_s must be a finite number"),
        (["--model=m", "--ssl_certfile=x"], "go together"),
        (["--model=m", "--api_key_file=/nowhere"], "cannot read api_key_file"),
        (["--model=m", "--config=/nowhere"], "cannot read --config"),
        (["--model=m", "--log_level=loud"], "log_level"),
        (["--model=m", "--dtype=float16", "--precision=mixed"], "ask for different dtypes"),
        (["--model=m", "--prewarm"], "prewarm"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(words, message, capsys):
    assert main(["serve", "--port=0", *words]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("fastgpt")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in err


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return build(tmp_path_factory.mktemp("served") / "small").output


@pytest.mark.slow
def test_an_artifact_is_what_it_was_compiled_to_be(artifact, capsys):
    assert main(["serve", f"--model={artifact}", "--strict", "--port=0"]) == 2
    assert "--strict are for models that are no artifacts" in capsys.readouterr().err
    assert main(["serve", f"--model={artifact}", "--max_num_seqs=7", "--port=0"]) == 2
    assert "max_num_seqs=7, but the model was compiled for 2" in capsys.readouterr().err


@pytest.fixture
def compiles(monkeypatch):
    """Options of each compilation that was asked for; nothing is compiled."""
    asked = []

    def execute(options):
        asked.append(options)
        Path(options.output).mkdir(parents=True)
        (Path(options.output) / MANIFEST).write_text("{}")

    monkeypatch.setattr(compile_tool, "execute", execute)
    return asked


def test_a_model_is_compiled_once_until_it_changes(tmp_path, compiles):
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    write(model, "weights", "model.safetensors")
    first = find_or_compile(str(model), {"max_num_seqs": 4, "strict": False, "dtype": None}, cache)
    assert first == find_or_compile(str(model), {"max_num_seqs": 4}, cache) and len(compiles) == 1
    assert first.parent == cache and first.name.startswith("model-") and compiles[0].max_num_seqs == 4
    assert find_or_compile(str(model), {"max_num_seqs": 8}, cache) != first
    write(model, "other weights", "model.safetensors")
    assert find_or_compile(str(model), {"max_num_seqs": 4}, cache) != first
    assert len(compiles) == 3


def test_a_file_among_the_options_counts_by_what_it_holds(tmp_path, compiles):
    model = write(tmp_path, "weights", "model.gguf")
    rules = write(tmp_path, "[]", "rules.json")
    found = set()
    for text in ("[]", "[1]", "[]"):
        write(tmp_path, text, "rules.json")
        found.add(find_or_compile(model, {"quantization_rules": rules}, tmp_path / "cache"))
    assert len(found) == 2


def test_a_wrong_option_of_the_compiler_is_one_line(tmp_path):
    with pytest.raises(UserError, match="page_size"):
        find_or_compile(write(tmp_path, "weights", "model.gguf"), {"page_size": -1}, tmp_path / "cache")


class Serving:
    """A server in a process of its own; leaving the block kills what is left of it."""

    def __init__(self, *words):
        command = [sys.executable, str(ROOT / "tools/serve.py"), "--port=0", *words]
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        announced = self.process.stdout.readline()
        assert announced.startswith("listening on http://127.0.0.1:"), self.lines
        self.client = httpx.Client(base_url=announced.split()[-1], timeout=60)

    def __enter__(self):
        assert self.client.get("/health/live").status_code == 200, "the port answers at once"
        while self.client.get("/health/ready").status_code != 200:
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.process.kill()
        self.process.wait()

    def generate(self, num_tokens, **fields):
        body = {"prompt": [1, 2, 3], "max_tokens": num_tokens, "ignore_eos": True, **fields}
        return self.client.post("/v1/completions", json=body)

    def end(self):
        return self.process.wait(30)


@pytest.mark.slow
def test_a_server_from_its_start_to_its_end(artifact, tmp_path):
    keys = write(tmp_path, "sesame\n", "keys.txt")
    words = (f"--model={artifact}", "--result_cache_ttl_s=60", "--open_metrics", f"--api_key_file={keys}")
    with Serving(*words, "--served_model_name=tiny") as server:
        assert server.generate(4).status_code == 401
        server.client.headers["authorization"] = "Bearer sesame"
        answers = [server.generate(8, temperature=0) for _ in range(2)]
        assert [answer.headers["x-fastgpt-cache"] for answer in answers] == ["miss", "hit"]
        assert answers[0].json()["model"] == "tiny" and answers[0].json()["usage"]["completion_tokens"] == 8
        metrics = httpx.get(f"{server.client.base_url}/metrics").text
        assert "fastgpt_compile_total 0.0" in metrics and "fastgpt_result_cache_hits_total 1.0" in metrics
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        records = [json.loads(line) for line in server.lines]
    assert [record["message"] for record in records if "status" not in record][-2:] == ["draining", "ended"]


@pytest.mark.slow
def test_sigterm_under_load_loses_nothing(artifact):
    with Serving(f"--model={artifact}", "--shutdown_timeout_s=20") as server, ThreadPoolExecutor(24) as pool:
        running = [pool.submit(server.generate, 20) for _ in range(24)]
        while server.client.get("/load").json()["server_load"] < 12:
            time.sleep(0.002)
        server.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in running]
        begun = [answer for answer in answers if answer.status_code == 200]
        assert len(begun) >= 12 and all(answer.json()["usage"]["completion_tokens"] == 20 for answer in begun)
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert server.end() == 0
        with pytest.raises(httpx.HTTPError):
            server.generate(1)


@pytest.mark.slow
def test_clients_that_hang_up_leave_nothing_behind(artifact):
    def hang_up(index):
        body = {"prompt": [1, 2, 3 + index % 9], "max_tokens": 20, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.client.base_url}/v1/completions", json=body, timeout=60) as answer:
            for _, _line in zip(range(1 + index % 3), answer.iter_lines(), strict=False):
                pass
            return answer.status_code

    def value(name):
        text = server.client.get("/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    with Serving(f"--model={artifact}", "--max_queue_len=400") as server, ThreadPoolExecutor(50) as pool:
        assert set(pool.map(hang_up, range(300))) == {200}
        deadline = time.monotonic() + 30
        while value("vllm:num_requests_running") + value("vllm:num_requests_waiting") > 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert value("vllm:kv_cache_usage_perc") == 0 and value("fastgpt_compile_total") == 0
        assert value("vllm:request_success_total") == 300
        assert server.client.get("/load").json()["server_load"] == 0
