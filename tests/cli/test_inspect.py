"""`fastgpt inspect`: text, JSON and the page, of a user's file and of an artifact, drawn by a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest

from fastgpt_jax.cli import inspect as tool
from fastgpt_jax.cli.tables import format_bytes, format_count
from fastgpt_jax.cli.xray_html import MAX_BYTES, render_html
from fastgpt_jax.compiler.config import CompileConfig
from fastgpt_jax.compiler.roofline import MACHINES
from fastgpt_jax.compiler.xray import DERIVED, xray
from tests.artifact import built

MODEL = """
import jax, jax.numpy as jnp

LAYERS = 3

def layer(x, p):
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    scores = jnp.where(mask, jnp.einsum("btd,bsd->bts", x @ p["q"], x), -1e9)
    x = x + jax.nn.softmax(scores) @ (x @ p["v"])
    return x + jax.nn.silu(x @ p["up"]) @ p["up"].T  # </script><b>not markup</b>

def fn(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = layer(x, p)
    return x @ params["embed"].T

def make_model():
    normal = lambda *shape: jax.random.normal(jax.random.key(sum(shape)), shape)
    layers = [{"q": normal(8, 8), "v": normal(8, 8), "up": normal(8, 16)} for _ in range(LAYERS)]
    return fn, {"embed": normal(20, 8), "layers": layers}
"""

REFUSED = """
import jax.numpy as jnp
def fn(p, t): return jnp.sort(p[t], axis=1)
def make_model(): return fn, jnp.ones((9, 9))
"""


@pytest.fixture
def inspect(tmp_path, capsys):
    """Runs the tool on the model; returns the exit code and what was printed."""

    def run(*flags, model=None):
        (tmp_path / "model.py").write_text(MODEL)
        code = tool.main([model or f"{tmp_path}/model.py:make_model", "--max_model_len=16", *flags])
        return code, *capsys.readouterr()

    return run


def test_the_text_shows_the_cache_the_passes_the_mask_and_the_program(inspect):
    code, out, err = inspect("--passes=cse,dce")
    assert (code, err) == (0, "")
    assert out.startswith("model.py:make_model: decode-r1-greedy at 16 tokens, 928 parameters")
    assert "cached: 96 bytes a token" in out or "cached: 192 bytes a token" in out
    assert re.search(r"^cse +exact +\d+", out, re.MULTILINE)
    assert "mask of layers 0 to 2, recognised (model.py:" in out and "\n  ##\n  ####\n" in out
    assert "the program, dce:" in out and "times {" in out
    assert re.search(r"dot_general.*# .*model\.py:\d+, .*FLOP .* memory", out)


def test_after_names_the_stage_that_is_shown(inspect):
    _, out, _ = inspect("--passes=canonicalize,cse", "--after=derived", "--format=json")
    found = json.loads(out)
    assert [stage["name"] for stage in found["stages"]] == [DERIVED, "canonicalize", "cse"]
    assert [stage["listing"] is None for stage in found["stages"]] == [False, True, True]
    assert len(found["stages"][0]["listing"]["rows"]) > 10
    assert found["cache"]["entries"] and found["machine"]["bytes_per_s"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--after=nope",), "--after must be one of derived, simplify, attention, "),
        (("--passes=nope",), "--passes: a pipeline names passes"),
        (("--format=pdf",), "<text|html|json>"),
        (("--output=/nowhere/x.html",), "--output must lie in a folder that there is"),
        (("--sparse=all: wind(4)",), "sparse 'all: wind(4)'"),
        (("--sparse=layers[3]: window(4)",), "reaches outside of the 3 layers of the model"),
        (("--sparse=all: full; heads[0]: window(4)", "--strict"), "decide about no head"),
        (("--quantization_rules=/nowhere.json",), "cannot read /nowhere.json"),
    ],
)
def test_a_mistake_is_one_line(inspect, flags, message):
    code, out, err = inspect(*flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_what_is_asked_of_a_compile_is_looked_at(inspect, tmp_path):
    (tmp_path / "rules.json").write_text('[{"pattern": "nobody", "scheme": "w4a16"}]')
    asked = ("--sparse=layers[1]: window(4)", "--kv_cache_dtype=int8", f"--quantization_rules={tmp_path}/rules.json")
    code, out, err = inspect("--passes=simplify", *asked)
    assert (code, err) == (0, "")
    passes = re.findall(r"^([a-z_]+) +(?:exact|reassociates|approximate|lossy) ", out, re.MULTILINE)
    assert passes == [
        *"simplify attention sparse_attention per_head narrow_reads simplify quantize_weights simplify".split()
    ]
    assert "layers[1]: window(4) over 3 layers" in out
    assert "quantization rules that are about no weight of the model: 'nobody'" in out
    assert re.search(r"cached: .*\n.*int8", out)
    pictures = out.split("mask of ")[1:]
    assert [p.partition(",")[0] for p in pictures] == ["layers 0", "layer 1"]
    assert pictures[1].splitlines()[16] == " " * (2 + 2 * 12) + "#" * 2 * 4


def test_a_model_that_is_refused_says_so(inspect, tmp_path):
    (tmp_path / "refused.py").write_text(REFUSED)
    code, out, err = inspect(model=f"{tmp_path}/refused.py:make_model")
    assert code == 1 and out == "" and err.startswith("refused: ")


class Tags(html.parser.HTMLParser):
    """Counts elements and collects what the page would load."""

    def __init__(self):
        super().__init__()
        self.names, self.loads, self.data, self._is_data = [], [], "", False

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        self._is_data = ("id", "data") in attrs

    def handle_endtag(self, tag):
        self._is_data = False

    def handle_data(self, data):
        self.data += data if self._is_data else ""


def test_the_page_is_one_file_that_loads_nothing_and_holds_a_models_lines_as_data(inspect, tmp_path):
    code, out, err = inspect("--format=html", "--passes=dce", f"--output={tmp_path}/x.html")
    page = (tmp_path / "x.html").read_text()
    assert code == 0 and out == "" and err.startswith(f"{tmp_path}/x.html: ")
    tags = Tags()
    tags.feed(page)
    assert tags.loads == [] and "b" not in tags.names and tags.names.count("script") == 2
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    data = json.loads(tags.data)
    lines = [text for source in data["sources"] for _, text in source["lines"]]
    assert any("</script><b>not markup</b>" in line for line in lines)
    assert data["shown"] == len(data["stages"]) - 1


def make_layers(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        scores = jnp.einsum("btd,bsd->bts", x @ p["q"], x)
        x = x + jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool)), scores, -1e9)) @ (x @ p["v"])
    return x @ params["embed"].T


def look_at_layers(num_layers, pipeline="simplify"):
    layers = [{name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in "qv"} for _ in range(num_layers)]
    params = {"embed": jax.ShapeDtypeStruct((20, 8), jnp.float32), "layers": layers}
    config = CompileConfig(max_model_len=32, pipeline=pipeline)
    return xray(make_layers, params, config, name="layers", machine=MACHINES["cpu"])


@pytest.mark.slow
def test_a_page_that_grows_too_large_leaves_programs_out_and_says_so(monkeypatch):
    found = look_at_layers(2, "canonicalize,cse,dce")
    whole = len(render_html(found, "dce").encode())
    monkeypatch.setattr("fastgpt_jax.cli.xray_html.MAX_BYTES", whole * 2 // 3)
    page = render_html(found, "dce")
    tags = Tags()
    tags.feed(page)
    stages = json.loads(tags.data)["stages"]
    assert len(page.encode()) < whole and stages[1]["is_left_out"] and stages[-1]["listing"] is not None


@pytest.mark.slow
def test_a_model_of_22_layers_stays_below_two_megabytes():
    found = look_at_layers(22, "canonicalize,cse,dce,simplify")
    assert max(repeat.count for repeat in found.stages[-1].listing.repeats) >= 20
    assert len(render_html(found, "simplify").encode()) < MAX_BYTES / 4


@pytest.mark.slow
def test_an_artifact_tells_what_its_manifest_holds(tmp_path, inspect):
    manifest = built.build(tmp_path / "artifact").manifest
    code, out, _ = inspect(model=str(tmp_path / "artifact"))
    record = next(r for r in manifest.entry_points if r.key.name == "decode-r2-greedy")
    assert code == 0 and out.startswith("small: decode-r2-greedy at ")
    assert f"cached: {manifest.layout.bytes_per_token:,} bytes a token" in out
    assert len(record.passes) > 1
    for done in record.passes:
        assert re.search(rf"^{done.name} +{done.numerics} .* {done.ops[1]} ", out, re.MULTILINE), done.name
    assert "holds no forward" in out
    refused, nothing, err = inspect("--sparse=all: window(4)", model=str(tmp_path / "artifact"))
    assert refused == 2 and nothing == "" and "an artifact is what it was compiled to be" in err
    work = record.program.work
    assert f"compiled: {format_count(work.flops)} FLOPs, {format_bytes(work.nbytes)} read and written" in out
    assert all(f"{count} x {name}" in out for name, count in work.libraries.items()) and work.libraries
    tags = Tags()
    tags.feed(inspect("--format=html", model=str(tmp_path / "artifact"))[1])
    assert json.loads(tags.data)["compiled"]["flops"] == work.flops


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_page(inspect, tmp_path):
    inspect("--format=html", "--passes=canonicalize,cse,dce", f"--output={tmp_path}/x.html")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [CHROMIUM, *flags.split(), "--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000"]
    drawn = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/x.html"], capture_output=True, text=True, timeout=120
    )
    assert "Uncaught" not in drawn.stderr
    dom = drawn.stdout
    assert dom.count('class="op') > 20 and dom.count("<circle") > 20 and dom.count("<path") > 20
    assert "times</b>" in dom and "<canvas" in dom and "Derived cache" in dom
    assert "&lt;/script&gt;&lt;b&gt;not markup" in dom
    assert dom.count('role="tab"') == 4
