"""Chat templates render in the sandbox, and fail in one line."""

import json
import tarfile

import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.tokenizer.chat_template import ChatTemplate, load_chat_template
from tests.shared_data import shared_path

MESSAGES = [{"role": "user", "content": "Hi <b> é"}]
ARCHIVES = ["llama.cpp-templates", "vllm-templates"]


def test_messages_special_tokens_and_generation_prompt_reach_the_template():
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    template = ChatTemplate(source, bos_token="<s>")
    assert template.render(MESSAGES) == "<s>[user]Hi <b> é>"
    assert template.render(MESSAGES, add_generation_prompt=False) == "<s>[user]Hi <b> é"


def test_tojson_does_not_escape():
    assert ChatTemplate("{{ tools | tojson }}").render([], tools=[{"é": "<>"}]) == '[{"é": "<>"}]'
    assert ChatTemplate("{{ x | tojson(indent=1) }}").render([], x=[1]) == "[\n 1\n]"


def test_blocks_leave_no_blank_lines():
    assert ChatTemplate("{% if true %}\n  {% if true %}\na\n{% endif %}\n{% endif %}\n").render([]) == "a\n"


def test_loop_controls_and_the_generation_tag_are_known():
    assert (
        ChatTemplate("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}").render([])
        == "1"
    )
    assert ChatTemplate("a{% generation %}{{ 1 + 1 }}{% endgeneration %}b").render([]) == "a2b"


def test_refusals_and_failures_are_user_errors_of_one_line():
    with pytest.raises(UserError, match="refuses these messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(MESSAGES)
    with pytest.raises(UserError, match="fails on these messages"):
        ChatTemplate("{{ messages[0].missing.field }}").render(MESSAGES)
    with pytest.raises(UserError, match="not valid Jinja, line 2"):
        ChatTemplate("a\n{% if %}")


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages.__class__ }}", "{{ range(10**9) | list }}"],
)
def test_a_template_cannot_leave_the_sandbox(source):
    template = ChatTemplate("{% set x = " + source[2:-2] + " %}{{ x.y.z }}")
    with pytest.raises(UserError):
        template.render(list(MESSAGES))


def test_jinja_file_comes_before_the_config(tmp_path):
    assert load_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path) == "d"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "c"}))
    assert load_chat_template(tmp_path) == "c"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert load_chat_template(tmp_path) == "j"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot read"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(UserError, match="chat_template as text"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("archive", ARCHIVES)
def test_templates_of_well_known_models_compile_and_most_render_a_plain_chat(archive):
    refused = []
    with tarfile.open(shared_path(f"templates/{archive}.tar.gz")) as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".jinja")]
        for member in members:
            template = ChatTemplate(tar.extractfile(member).read().decode(), bos_token="<s>", eos_token="</s>")
            try:
                assert "Hi" in template.render(MESSAGES)
            except (UserError, AssertionError) as error:
                refused.append((member.name, str(error)))
    assert len(members) > 20
    # Some are made for tools, for other roles or for documents alone.
    assert len(refused) <= len(members) // 5, refused
