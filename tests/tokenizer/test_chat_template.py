"""Chat templates render in the sandbox, and fail in one line."""

import json
import tarfile

import pytest

from fastgpt_jax.errors import UserError
from fastgpt_jax.tokenizer.chat_template import ChatTemplate, load_chat_template
from tests.shared_data import shared_path

MESSAGES = [{"role": "user", "content": "Hi <b> é"}]
ARCHIVES = {"llama.cpp-templates": 65, "vllm-templates": 31}

USER, ASSISTANT = MESSAGES[0], {"role": "assistant", "content": "Hello"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "d"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "time", "description": "Tells the time", "parameters": PARAMETERS}}
RESULT = {"role": "tool", "name": "time", "tool_call_id": "abcdefghi", "content": "noon"}


def call(arguments):
    function = {"name": "time", "arguments": arguments}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    return [USER, {"role": "assistant", "content": "", "tool_calls": calls}, RESULT, ASSISTANT, USER]


CONVERSATIONS = {
    "plain": {"messages": [USER], "tools": None},
    "turns": {"messages": [USER, ASSISTANT, USER], "tools": None},
    "system": {"messages": [{"role": "system", "content": "Be kind"}, USER, ASSISTANT, USER], "tools": None},
    "tools": {"messages": [USER], "tools": [TOOL]},
    "calls": {"messages": call({"city": "Rome"}), "tools": [TOOL]},
}
# What some templates need beside the above: variables of their own, or messages in another form.
NEEDED = {
    "fireworks-ai-llama-3-firefunction-v2": {"functions": "[]", "datetime": "1 January 2026"},
    "meetkai-functionary-medium-v3.2": {"messages": {"calls": call('{"city": "Rome"}')}},
    "template_vlm2vec": {
        "messages": dict.fromkeys(["plain", "tools"], [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    },
}
# They iterate over `tools` without asking whether there are any.
MADE_FOR_TOOLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
}
# No system role, roles that must alternate, one message at a time.
REFUSED = {
    "google-gemma-2-2b-it": {"system", "calls"},
    "template_vlm2vec": {"turns", "system", "calls"},
    "tool_chat_template_granite_20b_fc": {"system"},
}


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


def test_tojson_takes_the_options_of_transformers_and_lists_what_a_filter_yields():
    render = lambda expression: ChatTemplate("{{ " + expression + " }}").render([], x={"b": "é", "a": 1})
    assert render("x | tojson(ensure_ascii=true, separators=(',', ':'))") == r'{"b":"\u00e9","a":1}'
    assert render("x | tojson(sort_keys=true)") == '{"a": 1, "b": "é"}'
    assert render("[x] | map(attribute='a') | tojson") == "[1]"
    with pytest.raises(UserError, match="has no place in JSON"):
        render("cycler | tojson")


def test_a_template_may_use_a_list_as_a_queue_and_the_callers_stay_as_they_are():
    messages, tools = [{"role": "user", "content": ["a"]}], [{"name": "t"}]
    source = (
        "{% set queue = [] %}{% set _ = queue.append(3) %}{{ queue.pop(0) }}"
        "{% set _ = messages[0].content.append(1) %}{% set _ = tools.pop() %}{% set _ = extra.append(1) %}"
    )
    extra = []
    assert ChatTemplate(source).render(messages, tools=tools, extra=extra) == "3"
    assert (messages, tools, extra) == ([{"role": "user", "content": ["a"]}], [{"name": "t"}], [])


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
    ["{{ messages.clear() }}", "{{ ''.__class__.__mro__ }}", "{{ messages.__class__ }}", "{{ range(10**9) | list }}"],
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
def test_every_template_of_a_well_known_model_renders_every_conversation_it_does_not_refuse(archive):
    wrong = []
    with tarfile.open(shared_path(f"templates/{archive}.tar.gz")) as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".jinja")]
        for member in members:
            name = member.name.rsplit("/", 1)[-1].removesuffix(".jinja")
            template = ChatTemplate(tar.extractfile(member).read().decode(), bos_token="<s>", eos_token="</s>")
            wrong += [(name, *found) for found in try_all(name, template)]
    assert len(members) == ARCHIVES[archive]
    assert not wrong


def try_all(name, template):
    """The conversations that fail, or that are refused (or not) contrary to the table."""
    for kind, conversation in CONVERSATIONS.items():
        needed = NEEDED.get(name, {})
        conversation = conversation | {key: value for key, value in needed.items() if key != "messages"}
        conversation["messages"] = needed.get("messages", {}).get(kind, conversation["messages"])
        if conversation["tools"] is None and name in MADE_FOR_TOOLS:
            conversation["tools"] = []
        try:
            text = template.render(**conversation)
        except UserError as error:
            if kind not in REFUSED.get(name, ()) or "refuses these messages" not in str(error):
                yield kind, str(error)
        else:
            if kind in REFUSED.get(name, ()) or "Hi" not in text:
                yield kind, text
