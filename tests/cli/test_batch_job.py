"""Batch jobs without a model: what is read, what is written, and what a kill at any moment leaves."""

import asyncio
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt_jax.batch.in_process import InProcess
from fastgpt_jax.batch.job import Response, run_job
from fastgpt_jax.batch.journal import Journal
from fastgpt_jax.batch.requests import BadLine, BatchRequest, parse_line, read_requests, survey
from fastgpt_jax.errors import UserError

CHILD = Path(__file__).parent / "batch_child.py"


def a_request(name="a", **changes):
    body = {"prompt": name, "max_tokens": 2}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body, **changes}


def write_requests(path, num, prefix="r"):
    path.write_text("".join(json.dumps(a_request(f"{prefix}{i}")) + "\n" for i in range(num)))
    return path


async def echo(request):
    return Response(200, f"id-{request.number}", {"text": request.body["prompt"]})


def run(given, output, call=echo, window=4, **options):
    facts = survey(given)
    with Journal(output, identity={"input": facts.sha256}, last_number=facts.last_number) as journal:
        return asyncio.run(run_job(read_requests(given), journal, call, window=window, **options))


def answers(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "one JSON object"),
        (b"[1]", "got a list"),
        (b"\xff", "one JSON object"),
        (b"[" * 100_000, "one JSON object"),
        (json.dumps(a_request(custom_id="")).encode(), "custom_id must be a string"),
        (json.dumps(a_request(method="GET")).encode(), "method must be 'POST'"),
        (json.dumps(a_request(url="http://elsewhere/")).encode(), "url must be such as"),
        (json.dumps(a_request(url="/v1/completions\n")).encode(), "url must be such as"),
        (json.dumps(a_request(body={"temperature": float("nan")})).encode(), "NaN is no number"),
        (json.dumps(a_request(body=[])).encode(), "body must be a JSON object"),
        (json.dumps(a_request(extra=1)).encode(), "unknown field 'extra'"),
        (json.dumps(a_request(body={"stream": True})).encode(), "leave out stream"),
    ],
)
def test_a_line_that_is_no_request_says_why(line, reason):
    found = parse_line(7, line)
    assert isinstance(found, BadLine) and found.number == 7 and reason in found.reason


def test_a_good_line_is_read():
    found = parse_line(1, "\ufeff".encode() + json.dumps(a_request()).encode())
    assert found == BatchRequest(1, "a", "/v1/completions", {"prompt": "a", "max_tokens": 2})


def test_half_a_surrogate_pair_is_handed_on_as_it_came():
    found = parse_line(1, rb'{"custom_id":"a","method":"POST","url":"/v1/x","body":{"prompt":"\ud800"}}')
    assert found.content == rb'{"prompt":"\ud800"}'


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_survey_counts_what_holds_something(tmp_path, end):
    path = tmp_path / "in.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 2}\n  \n{"c": 3}' + end)
    facts = survey(path)
    assert (facts.num_lines, [r.number for r in read_requests(path)]) == (3, [1, 3, 5])
    assert facts.last_number >= 5


def test_survey_does_not_depend_on_where_pieces_end(tmp_path, monkeypatch):
    path = write_requests(tmp_path / "in.jsonl", 5)
    whole = survey(path)
    for size in (1, 2, 7, 100):
        monkeypatch.setattr("fastgpt_jax.batch.requests._PIECE_BYTES", size)
        assert survey(path) == whole


def test_a_line_that_is_too_long_is_one_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpt_jax.batch.requests.MAX_LINE_BYTES", 200)
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(a_request("x" * 5000)) + "\n" + json.dumps(a_request("b")) + "\n")
    first, second = read_requests(path)
    assert isinstance(first, BadLine) and "at most" in first.reason
    assert isinstance(second, BatchRequest) and second.number == 2


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_an_input_that_holds_nothing_is_refused(tmp_path, content):
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="--input"):
        survey(path)


def test_every_request_is_answered_once_and_bad_lines_stop_nobody(tmp_path):
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(a_request("a")), "{", json.dumps(a_request("b")), "", json.dumps(a_request("c", method="GET"))]
    given.write_text("\n".join(lines) + "\n")
    tally = run(given, output)
    found = {answer["id"]: answer for answer in answers(output)}
    assert sorted(found) == ["batch_req_1", "batch_req_2", "batch_req_3", "batch_req_5"]
    assert found["batch_req_1"]["response"] == {"status_code": 200, "request_id": "id-1", "body": {"text": "a"}}
    assert found["batch_req_1"]["error"] is None and found["batch_req_1"]["custom_id"] == "a"
    assert found["batch_req_2"]["response"] is None and "line 2" in found["batch_req_2"]["error"]["message"]
    assert found["batch_req_5"]["custom_id"] == "c"
    assert (tally.num_answered, tally.num_failed) == (4, 2)


def test_an_answer_that_is_an_error_says_so(tmp_path):
    async def refuse(request):
        return Response(400, "r", {"error": {"message": "no", "type": "t", "param": None, "code": "invalid_value"}})

    tally = run(write_requests(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl", refuse)
    (answer,) = answers(tmp_path / "out.jsonl")
    assert answer["error"] == {"code": "invalid_value", "message": "no"}
    assert answer["response"]["status_code"] == 400 and tally.num_failed == 1


def test_no_more_than_the_window_is_under_way(tmp_path):
    now, most = 0, 0

    async def slow(request):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return Response(200, "r", {})

    run(write_requests(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl", slow, window=5)
    assert most == 5


def test_a_stop_finishes_what_is_under_way_and_the_next_run_the_rest(tmp_path):
    given, output, started = write_requests(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl", []

    async def count(request):
        started.append(request.number)
        await asyncio.sleep(0.001)
        return Response(200, "r", {})

    run(given, output, count, should_stop=lambda: len(started) >= 10)
    assert 10 <= len(answers(output)) < 30
    run(given, output, count)
    assert sorted(started) == list(range(1, 31))
    assert sorted(a["custom_id"] for a in answers(output)) == sorted(f"r{i}" for i in range(30))


def test_a_torn_line_is_cut_off_and_answered_again(tmp_path):
    given, output = write_requests(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run(given, output)
    whole = output.read_bytes()
    ends = [at for at in range(len(whole)) if whole[at : at + 1] == b"\n"]
    for cut in sorted({*range(0, len(whole), 23), *ends, *(end + 1 for end in ends)}):
        output.write_bytes(whole[:cut])
        run(given, output)
        assert sorted(a["custom_id"] for a in answers(output)) == ["r0", "r1", "r2"], cut


def test_an_output_of_another_input_is_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    run(write_requests(tmp_path / "a.jsonl", 2), output)
    with pytest.raises(UserError, match="begun with another input"):
        run(write_requests(tmp_path / "b.jsonl", 3), output)
    (tmp_path / "out.jsonl.job.json").unlink()
    with pytest.raises(UserError, match="no job to go on with"):
        run(tmp_path / "a.jsonl", output)
    assert len(answers(output)) == 2


def test_a_foreign_line_is_refused(tmp_path):
    given, output = write_requests(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    run(given, output)
    with output.open("a") as file:
        file.write('{"hello": 1}\n')
    with pytest.raises(UserError, match="no answer of this job"):
        run(given, output)


def test_one_job_writes_at_a_time(tmp_path):
    identity = {"input": "x"}
    with Journal(tmp_path / "out.jsonl", identity=identity, last_number=1):
        with pytest.raises(UserError, match="another job"):
            Journal(tmp_path / "out.jsonl", identity=identity, last_number=1)


def test_a_failure_of_the_engine_leaves_requests_unanswered(tmp_path):
    given, output = write_requests(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"

    async def dies(request):
        if request.number == 3:
            raise UserError("the engine stopped")
        return await echo(request)

    with pytest.raises(UserError, match="the engine stopped"):
        run(given, output, dies, window=1)
    assert [a["custom_id"] for a in answers(output)] == ["r0", "r1"]
    run(given, output)
    assert sorted(a["custom_id"] for a in answers(output)) == [f"r{i}" for i in range(5)]


def test_memory_does_not_grow_with_the_input(tmp_path):
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = json.dumps(a_request("x" * 10_000)) + "\n"
    with given.open("w") as file:
        file.writelines(line for _ in range(5000))  # 50 MB

    async def brief(request):
        return Response(200, "r", {})

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(given, output, brief).num_answered == 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


@pytest.mark.slow
def test_killed_at_twenty_moments_every_request_is_answered_once(tmp_path):
    given, output = write_requests(tmp_path / "in.jsonl", 4000), tmp_path / "out.jsonl"
    rng, resumed = random.Random(0), []
    for _ in range(20):
        process = subprocess.Popen([sys.executable, CHILD, given, output], stdout=subprocess.PIPE, text=True)
        resumed.append(int(process.stdout.readline()))
        time.sleep(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert resumed == sorted(resumed) and 0 < resumed[-1] < 4000, "the kills fell within the job"
    subprocess.run([sys.executable, CHILD, given, output], check=True, stdout=subprocess.DEVNULL)
    found = [answer["custom_id"] for answer in answers(output)]
    assert len(found) == len(set(found)) == 4000


def test_a_request_that_finds_no_room_is_asked_again_and_is_no_failure():
    statuses = [429, 429, 200]

    async def app(scope, receive, send):
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"0")]
        await send({"type": "http.response.start", "status": statuses.pop(0), "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask():
        async with InProcess(app) as call:
            return await call(BatchRequest(1, "a", "/v1/completions", {}))

    assert asyncio.run(ask()).status == 200 and statuses == []
