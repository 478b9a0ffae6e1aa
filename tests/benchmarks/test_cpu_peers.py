"""The comparison with other engines: who is asked when, which setting counts, what is refused, and what is told."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cpu_peers, cpu_peers_edge
from benchmarks.peers import parts, report, summary
from benchmarks.peers.bandwidth import Bandwidth
from benchmarks.peers.contests import CACHE_TOKENS, CONTESTS, MAX_LEN, MEASURES, STEPS, Contestant, Measure
from benchmarks.peers.engine_fastgpt import seconds_a_step
from benchmarks.peers.protocol import EngineFailed, Worker
from benchmarks.peers.shapes import BOS, EOS, SHAPES
from benchmarks.peers.turns import Field
from benchmarks.peers.worker import make_prompt
from benchmarks.peers.write_model import draw_tensors, vocabulary, write_model
from fastgpt_jax.checkpoint import load_model
from fastgpt_jax.cli.compile import make_flags as make_compile_flags

DECODE, PREFILL = Measure("decode", 1, 1), Measure("prefill", 512, 512)
STUB = """
import sys
from benchmarks.peers import worker

class Engine:
    vocab_size = 100

    def __init__(self, threads, is_broken=False):
        print("chatter that is no answer")
        if is_broken:
            raise RuntimeError("no such model\\nand more")

    def about(self):
        return {"version": "1"}

    def prefill(self, prompt):
        if len(prompt) > 1000:
            sys.exit(3)
        if len(prompt) > 100:
            import time
            time.sleep(60)
        return len(prompt) / 1e3

worker.ENGINES["stub"] = "stub_engine"
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts workers of a made-up engine; its module adds itself to those known."""
    (tmp_path / "stub_engine.py").write_text(STUB)
    (tmp_path / "sitecustomize.py").write_text("")
    runner = tmp_path / "python"
    runner.write_text(
        f'#!/bin/sh\nshift 2\nexec {sys.executable} -c "import sys, json; '
        f"sys.path.insert(0, '{tmp_path}'); import stub_engine; from benchmarks.peers import worker; "
        'worker.main(sys.argv[1], json.loads(sys.argv[2]))" "$@"\n'
    )
    runner.chmod(0o755)
    workers = []

    def begin(timeout_s=20.0, **settings):
        workers.append(Worker(runner, "stub", settings, threads=1, timeout_s=timeout_s))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.close()


def test_a_worker_answers_in_lines_whatever_its_engine_prints(start):
    worker = start()
    assert worker.wait_until_ready()["version"] == "1"
    assert worker.ask("prefill", tokens=7, seed=1) == {"seconds": 0.007}
    assert worker.ask("memory")["VmHWM"] > 2**20


def test_what_an_engine_cannot_do_is_one_line_and_it_goes_on(start):
    with pytest.raises(EngineFailed, match=r"stub: load: RuntimeError: no such model$"):
        start(is_broken=True).wait_until_ready()
    worker = start()
    worker.wait_until_ready()
    with pytest.raises(EngineFailed, match="known are decode, prefill"):
        worker.ask("sing")
    with pytest.raises(EngineFailed, match="AttributeError"):
        worker.ask("decode", batch=1, prompt=2, steps=2, seed=1)
    assert worker.ask("prefill", tokens=3, seed=1)["seconds"] == 0.003


def test_a_worker_that_ends_or_hangs_is_told_and_is_gone(start):
    worker = start()
    worker.wait_until_ready()
    with pytest.raises(EngineFailed, match="ended with code 3 during prefill"):
        worker.ask("prefill", tokens=2000, seed=1)
    slow = start(timeout_s=8.0)
    slow.wait_until_ready()
    slow._timeout_s = 0.2
    with pytest.raises(EngineFailed, match="prefill took longer than 0 s"):
        slow.ask("prefill", tokens=200, seed=1)
    with pytest.raises(EngineFailed, match="ended"):
        slow.ask("prefill", tokens=3, seed=1)


class FakeWorker:
    """Answers with set times, and keeps what it was asked."""

    def __init__(self, log, name, seconds):
        self.log, self.name, self.seconds, self.is_open = log, name, seconds, True

    def wait_until_ready(self):
        if self.seconds is None:
            raise EngineFailed("does not load")
        return {"version": "1", "settings": {}}

    def ask(self, command, **arguments):
        self.log.append((self.name, command))
        found = self.seconds[command]
        if found is None or (found == "once" and arguments["seed"] >= 100):
            raise EngineFailed("cannot")
        if found == "once":
            return {"seconds": 1.0}
        return {"seconds": found}

    def close(self):
        self.is_open = False


def run_field(times, measures=(DECODE, PREFILL), rounds=2):
    """Runs engines whose settings take the given seconds; returns rows, what was asked, and the workers."""
    log, workers = [], {}

    def start(contestant, variant):
        name = f"{contestant.label}{variant['i']}"
        workers[name] = FakeWorker(log, name, times[contestant.label][variant["i"]])
        return workers[name]

    field = Field(start, lambda: 1e9, steps={1: 4}, settle_s=0.0)
    contestants = [Contestant(n, n, "", tuple({"i": i} for i in range(len(found)))) for n, found in times.items()]
    return list(field.run(contestants, measures, rounds)), log, workers


def test_each_measure_is_taken_at_the_setting_that_was_fastest_at_it():
    slow, fast, even = {"decode": 3.0, "prefill": 1.0}, {"decode": 1.0, "prefill": 2.0}, {"decode": 4.0, "prefill": 4.0}
    rows, log, workers = run_field({"a": [slow, fast, even, None]})
    chosen = {row["measure"]: row["variant"]["i"] for row in rows if row["row"] == "chosen"}
    assert chosen == {"decode 1": 1, "prefill 512": 0}
    assert [row["seconds"] for row in rows if row["row"] == "time"] == [1.0, 1.0, 1.0, 1.0]
    assert {name for name, worker in workers.items() if worker.is_open} == {"a0", "a1"}
    assert [row["why"] for row in rows if row["row"] == "failed"] == ["does not load"]


def test_engines_take_turns_and_another_begins_each_round():
    times = {"decode": 1.0}
    rows, _, _ = run_field({"a": [times], "b": [times], "c": [times]}, (DECODE,), rounds=3)
    order = [row["contestant"] for row in rows if row["row"] == "time"]
    assert order == [*"abc", *"bca", *"cab"]


def test_an_engine_that_cannot_do_a_measure_is_out_of_it_alone():
    even = {"decode": 1.0, "prefill": 2.0}
    rows, _, _ = run_field({"a": [{**even, "prefill": None}], "b": [even], "c": [{**even, "prefill": "once"}]})
    timed = {(row["contestant"], row["measure"]) for row in rows if row["row"] == "time"}
    assert timed == {("a", "decode 1"), ("b", "decode 1"), ("b", "prefill 512"), ("c", "decode 1")}
    assert [row["contestant"] for row in rows if row["row"] == "failed"] == ["a", "c"]


def test_the_bare_step_is_asked_of_ours_alone():
    bare = Measure("bare_decode", 1, 1)
    times = {"decode": 1.0, "bare_decode": 0.5}
    rows, _, _ = run_field({"fastgpt": [times], "other": [times]}, (DECODE, bare))
    assert {r["contestant"] for r in rows if r["row"] == "time" and r["measure"] == bare.name} == {"fastgpt"}


def test_a_step_is_timed_while_all_requests_run():
    early = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    late = [2.5, 3.0, 4.0, 5.0, 6.0]
    assert seconds_a_step([early, late]) == pytest.approx((5.0 - 3.0) * 2 / 4)
    with pytest.raises(RuntimeError, match="never ran together"):
        seconds_a_step([[0.0, 1.0, 2.0], [5.0, 6.0, 7.0]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "int8,speed"], "--only must be of int8, .* got speed"),
        (["--shapes", "llama-8b"], "--shapes must be of tinyllama-1.1b, .* got llama-8b"),
        (["--engines", "vllm"], "--engines must be of fastgpt, .* got vllm"),
        (["--engines", "torch"], "--peers must be an environment .* got None; --engines=fastgpt needs none"),
        (["--peers", "/nowhere"], "environment made by benchmarks/peers/environment.sh, got /nowhere"),
        (["--engines", "fastgpt", "--threads", "999"], "--threads must be the .* cores .* got 999"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is_made(words, message, tmp_path, capsys):
    assert cpu_peers.main(["--models", str(tmp_path / "models"), *words]) == 2
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    assert re.search(message, text), text
    assert not (tmp_path / "models").exists()


def test_a_written_model_is_loaded_with_its_tokenizer(tmp_path):
    write_model(SHAPES["tiny"], tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.num_key_value_heads == 2 and loaded.vocab_size == SHAPES["tiny"].vocab_size
    tokenizer = loaded.tokenizer
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode("abc d")) == "abc d"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS, (EOS,))


def test_shapes_have_the_weights_of_the_models_they_are_named_after():
    def count(name):
        shape = SHAPES[name]
        embedding = shape.vocab_size * shape.hidden_size
        return shape.num_read + (0 if shape.is_qwen2 else embedding)

    assert count("tinyllama-1.1b") == pytest.approx(1.1e9, rel=0.01)
    assert count("qwen2-0.5b") == pytest.approx(0.494e9, rel=0.01)
    tiny = SHAPES["tiny"]
    matrices = sum(t.size for name, t in draw_tensors(tiny) if t.ndim == 2 and "embed" not in name)
    assert tiny.num_read == matrices
    assert len(set(vocabulary(tiny.vocab_size))) == tiny.vocab_size


def test_prompts_differ_and_hold_no_special_id():
    prompts = [make_prompt(512, 64, seed) for seed in range(50)]
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 50
    assert all(3 <= token_id < 512 for prompt in prompts for token_id in prompt)


def test_bandwidth_is_of_memory_and_not_of_a_loop_that_was_dropped():
    assert 1e8 < Bandwidth(1).measure() < 1e12


def make_rows():
    """A run: ours takes 10, 11 and 12 ms a step, the others twice and half of that."""
    step_bytes = CONTESTS["int8"].step_bytes(SHAPES["tiny"])
    run = {
        "row": "run",
        "cpu": "CPU",
        "family_model": "1/2",
        "features": ["avx2"],
        "cores": 2,
        "threads": 2,
        "page_size": 4096,
        "huge_pages": "never",
        "kernel": "6",
        "python": "3",
        "load": 0.0,
        "commit": "abc",
        "rounds": 3,
        "is_quick": False,
    }
    rows = [run, {"row": "limit", "contest": "int8", "step_bytes": step_bytes}]
    for label, factor in (("llama.cpp q8_0", 2.0), ("fastgpt int8", 1.0), ("openvino int8", 0.5)):
        settings = {"row": "about", "about": {"version": "v", "build": "b", "settings": {"threads": 2}}}
        rows.append({**settings, "contestant": label, "variant": {"x": 1}, "contest": "int8"})
        rows.append({"row": "chosen", "contestant": label, "variant": {"x": 1}, "measure": "decode 1"})
        for index in range(3):
            seconds = factor * (0.010 + 0.001 * index)
            row = {"row": "time", "contest": "int8", "contestant": label, "measure": "decode 1", "round": index}
            rows.append({**row, "seconds": seconds, "bandwidth": 2 * step_bytes / (0.010 + 0.001 * index)})
    rows.append({"row": "failed", "contestant": "openvino int8", "measure": "prefill 512", "why": "it cannot"})
    return [rows[0], *({**row, "shape": "tiny"} for row in rows[1:])]


def test_figures_are_medians_and_shares_of_the_bandwidth_beside_them():
    rows = make_rows()
    found = summary.figure(rows, "int8", "fastgpt int8", "decode 1")
    assert found is not None
    assert found.tokens_a_second == pytest.approx(1 / 0.011)
    assert found.spread == pytest.approx((1 / 0.012, 1 / 0.010))
    assert found.share == pytest.approx(0.5)
    assert summary.ratio(rows, "int8", "fastgpt int8", "llama.cpp q8_0", "decode 1") == pytest.approx(2.0)
    assert summary.limit(rows, "int8", "decode 1") == pytest.approx(2 / 0.011)


def test_verdicts_say_what_was_asked_and_found():
    verdicts = {verdict.text: verdict for verdict in summary.verdicts(make_rows())}
    assert verdicts["int8, decode 1: times llama.cpp q8_0"].is_met
    assert not verdicts["int8, decode 1: times openvino int8"].is_met
    assert verdicts["int8, decode 1: share of the read bandwidth"].found == pytest.approx(0.5)


def test_a_report_names_settings_and_what_was_not_measured():
    text = "\n".join(report.report(make_rows()))
    assert "| fastgpt int8 | 90.9 (0.50) |" in text
    assert "fastest for decode 1: threads=2" in text
    assert "- not measured: openvino int8, prefill 512: it cannot" in text
    assert text.index("| fastgpt int8") < text.index("| llama.cpp q8_0")


def test_the_page_keeps_what_is_around_the_tables(tmp_path):
    page = tmp_path / "cpu.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_page(["new"], page)
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.BEGIN in report.PAGE.read_text() and report.END in report.PAGE.read_text()


def test_the_config_for_eight_gigabytes_is_what_its_page_and_the_compiler_say():
    flags = cpu_peers_edge.compile_flags("MODEL", Path("OUT"))
    options = make_compile_flags()
    options(["compile", *flags])
    assert options["quantization"].value == "w4a8" and options["max_model_len"].value == 4096
    for text in (report.PAGE.read_text(), cpu_peers_edge.CONFIG.read_text()):
        assert all(flag in text for flag in flags if flag.startswith("--") and "=" in flag and "verify" not in flag)


def test_the_page_says_whether_it_fits():
    row = {"weight_bytes": 5e9, "RssAnon": 1e9, "first_token_s": 2.0, "commit": "abc", "bandwidth": 4e10}
    row |= {"prefill_tokens_a_second": 20.0, "decode_tokens_a_second": 5.0}
    assert "it fits 8 GB" in next(cpu_peers_edge.tell({**row, "VmHWM": 7.9e9}))
    assert "it does not fit 8 GB" in next(cpu_peers_edge.tell({**row, "VmHWM": 8.1e9}))


def test_the_neighbour_takes_one_core_and_ends():
    with parts._Neighbour(True) as process:
        assert process is not None and process.poll() is None
        assert len(os.sched_getaffinity(process.pid)) == 1
    assert process.poll() is not None


def test_divergence_is_nought_for_equal_logits_up_to_a_constant():
    logits = np.random.default_rng(0).normal(size=64)
    assert parts.divergence(logits, logits + 5) == pytest.approx(0, abs=1e-12)
    assert parts.divergence(logits, -logits) > 0.1


def test_time_added_by_context_is_held_against_the_bytes_added():
    rows = [
        {"tokens": n, "seconds": 0.01 + 3 * (n - 128) * 100 / 1e9, "bandwidth": 1e9, "shape": "tiny"}
        for n in parts.CONTEXTS
    ]
    assert parts.added_over_limit(rows, 100) == pytest.approx(dict.fromkeys(parts.CONTEXTS[1:], 3.0))


def test_every_measure_has_room_in_the_caches_even_where_prompts_are_read_one_by_one():
    for measure in MEASURES:
        asked = measure.arguments(1, STEPS.get(measure.size, 0))
        if measure.kind == "prefill":
            assert asked["tokens"] < min(MAX_LEN, CACHE_TOKENS)
        else:
            assert measure.size * (asked["prompt"] + asked["steps"] + measure.size + 32) <= CACHE_TOKENS


@pytest.mark.slow
def test_a_quick_run_of_ours_alone_measures_all_that_needs_no_other_engine(tmp_path, capsys):
    words = ["--quick", "--shapes=tiny", "--engines=fastgpt", "--only=float32,startup,exactness", "--rounds=1"]
    kept, picture = tmp_path / "run.jsonl", tmp_path / "run.png"
    told = [f"--models={tmp_path / 'models'}", f"--jsonl={kept}", f"--picture={picture}"]
    assert cpu_peers.main([*words, *told]) == 0
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row for row in rows if row["row"] == "failed"] == []
    timed = {row["measure"] for row in rows if row["row"] == "time"}
    assert timed == {"decode 1", "decode 8", "bare decode 1", "bare decode 8", "prefill 128"}
    (exact,) = [row for row in rows if row["row"] == "exactness"]
    assert exact["logprob_error"] < 1e-4 and exact["mean_kld"] < 1e-6
    assert picture.read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "### tiny" in out and "float32: largest error of a log-probability" in out
    assert Path(tmp_path / "models" / "tiny" / "fastgpt-float32-quick").is_dir()
