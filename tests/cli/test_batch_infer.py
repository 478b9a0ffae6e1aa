"""`fastgpt batch_infer`: what it refuses, and whole jobs over a small artifact, killed and interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fastgpt_jax.cli.batch_infer import main
from tests.artifact.built import build

NUM_REQUESTS = 120


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "small"
    build(folder)
    return folder


def write_requests(path, num=NUM_REQUESTS):
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(num):
            prompt = [rng.randrange(1, 23) for _ in range(rng.randrange(3, 9))]
            body = {"model": "small", "prompt": prompt, "max_tokens": rng.randrange(1, 12), "ignore_eos": True}
            request = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps({**request, "body": {**body, "temperature": 0}}) + "\n")
    return path


def start(artifact, given, output):
    code = "import sys; from fastgpt_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "batch_infer"]
    words += [f"--model={artifact}", f"--input={given}", f"--output={output}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process, output, num):
    deadline = time.monotonic() + 120
    while num_lines(output) < num and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "must be given"),
        (["--model=a", "--input=/no/such", "--output=/tmp/x"], "cannot read --input"),
        (
            ["--model=a", "--input=i", "--output=o", "--pipeline_parallel=2"],
            "pipeline_parallel_size=2 is not supported",
        ),
        (["--model=a", "--input=i", "--output=o", "--batch_size=0"], "batch_size"),
        (["--model_path=/no/such/model", "--input=HERE", "--output=/tmp/x"], "/no/such/model"),
    ],
)
def test_wrong_input_is_one_line(words, told, capsys, tmp_path):
    given = write_requests(tmp_path / "in.jsonl", 1)
    assert main([word.replace("HERE", str(given)) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.slow
def test_a_job_killed_at_any_moment_is_finished_and_answers_as_one_that_was_not(artifact, tmp_path):
    given = write_requests(tmp_path / "in.jsonl")
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    process = start(artifact, given, whole)
    out, err = process.communicate()
    assert process.returncode == 0 and f"{NUM_REQUESTS} requests in" in out, err
    for target in (1, 30, 31, 90):
        process = start(artifact, given, killed)
        wait_for_lines(process, killed, target)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(artifact, given, killed)
    _, err = process.communicate()
    assert process.returncode == 0 and "have their answers" in err
    expected, found = ({(a := json.loads(line))["custom_id"]: a for line in path.open()} for path in (whole, killed))
    assert num_lines(killed) == len(found) == NUM_REQUESTS
    text = {name: answer["response"]["body"]["choices"][0] for name, answer in expected.items()}
    assert {name: answer["response"]["body"]["choices"][0] for name, answer in found.items()} == text
    process = start(artifact, given, killed)
    assert process.wait() == 0 and num_lines(killed) == NUM_REQUESTS, "a finished job has nothing left to do"


@pytest.mark.slow
def test_an_interrupt_finishes_what_is_under_way(artifact, tmp_path):
    given, output = write_requests(tmp_path / "in.jsonl", 600), tmp_path / "out.jsonl"
    process = start(artifact, given, output)
    wait_for_lines(process, output, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "run the same command again" in err and "Traceback" not in err
    assert 1 <= num_lines(output) < 600 and all(json.loads(line)["error"] is None for line in output.open())
