"""`fastgpt bench`: workloads, figures, and the tool against a server of a few lines."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastgpt_jax.bench.client import Client
from fastgpt_jax.bench.load import closed_loop, open_loop
from fastgpt_jax.bench.record import Objective, Record, summarize
from fastgpt_jax.bench.workload import Lengths, Workload, replay
from fastgpt_jax.cli import bench_offline
from fastgpt_jax.cli.bench import main
from fastgpt_jax.cli.bench_rows import format_spread
from fastgpt_jax.engine.llm import LLM
from fastgpt_jax.errors import UserError
from tests.engine.fake import FakeCompiled


def a_workload(**changes):
    return Workload(
        **{"num_requests": 50, "prompt_len": Lengths(4, 9), "output_len": Lengths(2, 5), "vocab_size": 40, **changes}
    )


def test_a_workload_is_decided_by_its_seed():
    workload = a_workload(cancel_share=0.5)
    assert workload.make(1, 2.0) == workload.make(1, 2.0) != workload.make(2, 2.0)


def test_a_workload_keeps_to_what_was_asked():
    made = a_workload(num_requests=2000, cancel_share=0.25).make(0, 50.0)
    assert {len(r.prompt_ids) for r in made} == set(range(4, 10)) and {r.max_tokens for r in made} == set(range(2, 6))
    assert all(3 <= i < 40 for r in made for i in r.prompt_ids)
    assert made[0].at_s == 0 and made[-1].at_s == pytest.approx(40, rel=0.1)
    leaving = [r for r in made if r.cancel_after is not None]
    assert len(leaving) == pytest.approx(500, rel=0.15) and all(1 <= r.cancel_after <= r.max_tokens for r in leaving)
    assert all(r.at_s == 0 for r in a_workload().make(0, None))


def test_prompts_of_a_group_share_their_prefix():
    made = a_workload(prefix_len=6, num_prefixes=3).make(0, None)
    assert len({r.prompt_ids[:6] for r in made}) == 3 and len({r.prompt_ids for r in made}) > 40
    assert min(len(r.prompt_ids) for r in made) == 7


def test_azures_form_is_read(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,4000,44\n"
        "2023-11-16 18:15:50.5000000,39,10\n2023-11-16 18:15:51.750000+00:00,20,5\n"
    )
    made = replay(path, num_requests=10, max_len=100, vocab_size=50, speed=2.0)
    assert [(r.at_s, len(r.prompt_ids), r.max_tokens) for r in made] == [(0, 39, 10), (pytest.approx(0.625), 20, 5)]


def test_mooncakes_form_is_read_and_blocks_recur(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [(0, 1100, 3, [7, 8, 9]), (1500, 1030, 2, [7, 8, 5]), (2000, 600, 1, [6, 8])]
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    first, second, third = replay(path, num_requests=10, max_len=2000, vocab_size=50)
    assert (second.at_s, len(first.prompt_ids), third.max_tokens) == (1.5, 1100, 1)
    assert (
        first.prompt_ids[:1024] == second.prompt_ids[:1024] and first.prompt_ids[1024:1030] != second.prompt_ids[1024:]
    )
    assert third.prompt_ids[512:] == first.prompt_ids[512:600] and third.prompt_ids[:512] != first.prompt_ids[:512]


@pytest.mark.parametrize(
    "name, text", [("a.csv", "x,y\n1,2\n"), ("a.jsonl", "{}\n"), ("a.jsonl", "no\n"), ("a.csv", "")]
)
def test_another_form_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="--trace"):
        replay(tmp_path / name, num_requests=1, max_len=100, vocab_size=50)


def a_record(sent=0.0, pieces=(1.0, 2.0, 4.0), end=4.0, tokens=3, status=200, **options):
    return Record(sent, pieces, end, 5, tokens, status, **options)


def test_figures_are_those_of_the_definitions():
    records = [
        a_record(),
        a_record(sent=1.0, end=9.0, pieces=(3.0, 9.0), tokens=4),
        a_record(status=429, pieces=(), tokens=0),
    ]
    found = summarize(records, Objective(ttft_s=1.5))
    assert (found["num_whole"], found["num_failed"], found["statuses"]) == (2, 1, {"200": 2, "429": 1})
    assert found["seconds"] == 9 and found["output_tokens_per_s"] == pytest.approx(7 / 9)
    assert found["ttft_ms"]["p50"] == 1500 and found["tpot_ms"]["p50"] == pytest.approx((1500 + 2000) / 2)
    assert found["itl_ms"]["p50"] == 2000 and found["e2e_ms"]["p99"] == pytest.approx(7960)
    assert found["goodput_per_s"] == pytest.approx(1 / 9)


def test_who_left_early_is_in_no_latency():
    found = summarize([a_record(), a_record(was_cancelled=True, pieces=(100.0,), end=100.0, tokens=1)])
    assert (found["num_cancelled"], found["num_whole"], found["e2e_ms"]["p99"]) == (1, 1, 4000)
    assert summarize([a_record(pieces=(), tokens=0), a_record()])["num_empty"] == 1
    assert summarize([a_record(status=0, pieces=(), tokens=0)])["ttft_ms"] is None


def test_a_closed_loop_holds_its_number_and_an_open_one_its_times():
    requests, now, most, sent = a_workload(num_requests=30).make(0, 300.0), 0, 0, []

    async def ask(asked):
        nonlocal now, most
        now += 1
        most = max(most, now)
        sent.append((asyncio.get_running_loop().time(), asked.at_s))
        await asyncio.sleep(0.005)
        now -= 1
        return a_record()

    assert len(asyncio.run(closed_loop(requests, ask, 4))) == 30 and most == 4
    sent.clear()
    assert len(asyncio.run(open_loop(requests, ask))) == 30
    late = [at - sent[0][0] - due for at, due in sent]
    assert min(late) > -0.003, "nothing is sent before its time"


class Handler(BaseHTTPRequestHandler):
    """Answers completions with a token for each that was asked for; every fourth request is refused."""

    num_seen = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).num_seen += 1
        if body["model"] != "m" or (body["stream"] and self.num_seen % 4 == 0):
            self.send_response(429 if body["model"] == "m" else 404)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if not body["stream"]:
            return
        events = [{"choices": [{"text": "x"}]}] * body["max_tokens"]
        events += [{"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}]
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Handler.num_seen = 0
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def test_an_engine_tells_its_throughput_and_how_long_the_device_waited(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_offline, "is_artifact", lambda model: True)
    monkeypatch.setattr(bench_offline, "LLM", lambda model: LLM(FakeCompiled(is_fast=True)))
    flags = ["offline", "--model", "m", "--runs", "2", "--num_requests", "5", "--vocab_size", "30"]
    flags += ["--prompt_len", "3-9", "--output_len", "4", "--jsonl", str(tmp_path / "rows.jsonl")]
    assert main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [round(row["output_tokens_per_s"] * row["seconds"]) for row in rows] == [20, 20]
    assert all(row["step_ms"] >= 0 and row["idle_ms_per_step"] >= 0 for row in rows)
    assert "idle_ms_per_step" in capsys.readouterr().out


def test_a_sweep_gives_a_table_a_line_a_level_and_a_picture(server, tmp_path, capsys):
    flags = ["serve", "--base_url", server, "--model", "m", "--num_requests", "8", "--output_len", "3", "--warmup", "0"]
    flags += ["--concurrency", "1,4", "--jsonl", str(tmp_path / "rows.jsonl"), "--picture", str(tmp_path / "load.png")]
    assert main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["load"], row["num_whole"], row["num_failed"]) for row in rows] == [(1, 6, 2), (4, 6, 2)]
    assert rows[0]["output_tokens_per_s"] * rows[0]["seconds"] == pytest.approx(18)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert "TTFT" in capsys.readouterr().out


def test_rates_are_an_open_loop(server, tmp_path):
    flags = ["serve", "--base_url", server, "--model", "m", "--num_requests", "6", "--output_len", "2", "--warmup", "1"]
    assert main([*flags, "--rates", "200", "--seeds", "2", "--jsonl", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["num_requests"], row["load_name"]) for row in rows] == [
        (0, 6, "requests/s asked"),
        (1, 6, "requests/s asked"),
    ]


def test_no_two_levels_ask_the_same_prompts(server, monkeypatch):
    asked = []
    ask = Client.ask
    monkeypatch.setattr(Client, "ask", lambda self, one: (asked.append(one.prompt_ids), ask(self, one))[1])
    flags = ["serve", "--base_url", server, "--model", "m", "--num_requests", "5", "--output_len", "1"]
    assert main([*flags, "--concurrency", "1,2", "--seeds", "2", "--warmup", "3"]) == 0
    assert len(set(asked)) == len(asked) == 4 * 5 + 3


@pytest.mark.parametrize(
    "words, told",
    [
        (["serve", "--model", "m"], "give --rates"),
        (["serve", "--model", "m", "--rates", "1", "--concurrency", "1"], "give --rates"),
        (["serve", "--model", "m", "--rates", "x"], "--rates must be numbers"),
        (["serve", "--model", "m", "--concurrency", "1.5"], "whole numbers"),
        (["serve", "--model", "m", "--rates", "1", "--base_url", "http://127.0.0.1:9"], "cannot be reached"),
        (["serve", "--model", "m", "--rates", "1", "--prompt_len", "9-3"], "--prompt_len must be"),
        (["serve", "--model", "m", "--trace", "/no/such.csv"], "cannot read --trace"),
        (["serve", "--model", "m", "--rates", "1", "--api_key_file", "/no/such"], "no first line"),
        (["offline", "--model", "/no/such"], "must be an artifact"),
        (["startup", "--model", "/no/such"], "must be an artifact"),
        (["speed"], "measures one of"),
    ],
)
def test_wrong_input_is_one_line(words, told, capsys, server):
    if "--base_url" not in words and words[0] == "serve":
        words = [*words, "--base_url", server]
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "seed" not in line]
    assert told in line


def test_a_model_that_the_server_has_not_is_told(server, capsys):
    assert main(["serve", "--base_url", server, "--model", "other", "--rates", "1"]) == 2
    assert "answers 404" in capsys.readouterr().err


def test_a_spread_is_median_least_and_most():
    table = format_spread([{"a": 1}, {"a": 4}, {"a": 9}], ["a"], what="seconds", digits=1)
    assert [line.split() for line in table.splitlines()] == [
        ["seconds", "median", "least", "most"],
        ["a", "4.0", "1.0", "9.0"],
    ]
