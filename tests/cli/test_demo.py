"""`fastgpt demo`: the scene on standard output, the measurements on standard error."""

from pathlib import Path

import pytest

from fastgpt_jax.cli.demo import main


@pytest.mark.slow
def test_it_explains_streams_and_measures(capsys):
    assert main(["--max_tokens=8", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ROMEO:\n")
    assert "tokens/s" not in out
    served, recomputed = (line for line in err.splitlines() if line.endswith("tokens/s"))
    assert float(served.split()[-2]) > float(recomputed.split()[-2])
    assert "509 of 509 tokens equal" in err
    page = Path(err.splitlines()[-1])
    assert page.name == "xray.html" and page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("flag", "message"), [("--temperature=nan", "temperature must be"), ("--prompt=", "the prompt is empty")]
)
def test_a_mistake_is_one_line_and_exit_2(flag, message, capsys):
    assert main([flag]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fastgpt demo: {message}") and err.count("\n") == 1
