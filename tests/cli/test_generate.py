"""`fastgpt generate` over a fake compiler: what goes to which stream, and what a mistake looks like."""

from __future__ import annotations

from typing import ClassVar

import pytest

from fastgpt_jax.cli import compile_for_prompts, generate, model_source
from fastgpt_jax.cli.model_source import ModelSource
from fastgpt_jax.errors import UserError
from tests.engine.fake import CharTokenizer, FakeCompiled, continue_greedily


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool on the fake model; returns exit code, standard output, standard error, and the configs used."""

    def run_tool(*argv, tokenizer=None, max_model_len=None):
        configs = []

        def compile_model(model, params=None, config=None, tokenizer=None):
            configs.append(config)
            return FakeCompiled(
                tokenizer=tokenizer, max_model_len=config.max_model_len, max_num_seqs=config.max_num_seqs
            )

        monkeypatch.setattr(compile_for_prompts, "compile_model", compile_model)
        source = ModelSource(len, {}, tokenizer, max_model_len)
        monkeypatch.setattr(model_source, "load_source", lambda *flags: source)
        code = generate.main(["--model", "m", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, configs

    return run_tool


def greedy_text(prompt, num_tokens):
    tokenizer = CharTokenizer()
    return tokenizer.decode(continue_greedily(tokenizer.encode(prompt), num_tokens))


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_text_goes_to_standard_output_in_the_order_of_the_prompts(tool, stream):
    argv = ("--prompt", "a longer one", "--prompt", "b", "--max-tokens", "5", "--temperature", "0", *stream)
    code, out, err, configs = tool(*argv, tokenizer=CharTokenizer())
    assert code == 0
    assert out == greedy_text("a longer one", 5) + "\n" + greedy_text("b", 5) + "\n"
    assert "10 tokens in" in err
    assert (configs[0].max_model_len, configs[0].max_num_seqs) == (17, 2)


def test_a_model_without_tokenizer_takes_and_prints_ids(tool):
    code, out, _, _ = tool("--prompt_ids", "1,2, 3", "--max_tokens", "4", "--temperature", "0")
    assert code == 0 and out == ",".join(map(str, continue_greedily([1, 2, 3], 4))) + "\n"


def test_a_prompts_file_holds_a_prompt_a_line_and_a_bad_one_does_not_lose_the_others(tool, tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\n" + "c" * 30 + "\nd\n")
    argv = ("--prompts_file", str(tmp_path / "prompts.txt"), "--max_tokens", "3", "--temperature", "0")
    code, out, err, _ = tool(*argv, tokenizer=CharTokenizer(), max_model_len=20)
    assert code == 2
    assert out == greedy_text("ab", 3) + "\n" + greedy_text("d", 3) + "\n"
    assert "prompt 2: the prompt has 30 tokens and the context holds 20" in err


def test_an_empty_line_is_named_and_other_lines_are_as_an_editor_shows_them(tool, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfab\r\n\r\nd\x0ce\r\n")
    argv = ("--prompts_file", str(tmp_path / "prompts.txt"), "--max_tokens", "3", "--temperature", "0")
    code, out, err, _ = tool(*argv, tokenizer=AnyTokenizer())
    assert code == 2 and err.startswith("fastgpt generate: prompt 2: the prompt is empty")
    assert AnyTokenizer.seen == ["ab", "d\x0ce"] and out.count("\n") == 2


class AnyTokenizer(CharTokenizer):
    """Takes every character, and keeps what it was given."""

    seen: ClassVar[list[str]] = []

    def encode(self, text):
        self.seen.append(text)
        return [1] * len(text)


def test_an_empty_file_holds_no_prompt(tool, tmp_path):
    (tmp_path / "prompts.txt").write_text("")
    code, _, err, _ = tool("--prompts_file", str(tmp_path / "prompts.txt"))
    assert code == 2 and "there is no prompt" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "there is no prompt"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "text"), "no tokenizer"),
        (("--prompt_ids", "1,x"), "must be whole numbers"),
        (("--prompt_ids", ""), "the prompt is empty"),
        (("--prompt_ids", "99"), "token id 99 is outside the vocabulary of 32"),
        (("--prompt_ids", "1", "--temperature", "nan"), "temperature must be between 0 and 1000000, got nan"),
        (("--prompt_ids", "1", "--top_p", "2"), "top_p must be above 0 and at most 1"),
        (("--prompt_ids", "1", "--max_num_seqs", "-1"), "--max_num_seqs must be at least 1, got -1"),
        (("--prompt_ids", "1", "--max_num_seqs", "0"), "--max_num_seqs must be at least 1, got 0"),
        (("--prompt_ids", "1", "--max_model_len", "0"), "--max_model_len must be at least 2, got 0"),
        (("--prompt_ids", "1", "--max_model_len", "1"), "--max_model_len must be at least 2, got 1"),
        (("--prompts_file", "/nowhere"), "cannot read --prompts_file /nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(tool, argv, message):
    code, out, err, _ = tool(*argv)
    lines = [line for line in err.splitlines() if not line.startswith("compiled")]
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0]


def test_a_context_longer_than_the_models_is_refused(tool):
    code, _, err, _ = tool("--prompt_ids", "1", "--max_model_len", "99", max_model_len=20)
    assert code == 2 and "at most the model's own 20" in err


def test_loading_mistakes_are_one_line(monkeypatch, capsys):
    def fail(*flags):
        raise UserError("no such folder: /nowhere")

    monkeypatch.setattr(model_source, "load_source", fail)
    assert generate.main(["--model", "/nowhere", "--prompt", "a"]) == 2
    assert capsys.readouterr().err == "fastgpt generate: no such folder: /nowhere\n"
