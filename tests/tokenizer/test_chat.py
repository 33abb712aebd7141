"""Chat templates against the rendering of transformers, and what the sandbox refuses."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from shardlens.tokenizer.chat import ChatTemplate, find_chat_template

HERMES = "NousResearch-Hermes-3-Llama-3.1-8B-tool_use"
NAMES = [
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen3",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
]
SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
SYSTEM = {"role": "system", "content": "Be brief & <kind>."}
USER = {"role": "user", "content": "  What's 漢字?\n"}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nCharacters."}
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, USER],
    "answered": [SYSTEM, USER, ASSISTANT],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds <a> & 'b' — ü",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
# The templates print today's date otherwise, and midnight may fall between two renderings.
DATE: dict[str, Any] = {"date_string": "01 Jan 2025"}


def rendered_by_transformers(source: str, messages: list[Any], **variables: Any) -> str:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils")
    texts, _ = oracle.render_jinja_template([messages], chat_template=source, **variables)
    return str(texts[0])


def read_template(shared_data: Path, name: str) -> str:
    return (shared_data / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no prompt"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_renders_as_transformers_does(
    name: str, conversation: str, prompt: bool, shared_data: Path
) -> None:
    source, messages = read_template(shared_data, name), CONVERSATIONS[conversation]
    given: dict[str, Any] = {"add_generation_prompt": prompt, **DATE}
    text = ChatTemplate(source, special_tokens=SPECIAL).render(messages, **given)
    assert text == rendered_by_transformers(source, messages, **given, **SPECIAL)
    assert "漢字" in text


@pytest.mark.parametrize("name", [HERMES, *NAMES[:2], *NAMES[4:]])
def test_tools_are_written_without_html_escapes(name: str, shared_data: Path) -> None:
    source = read_template(shared_data, name)
    text = ChatTemplate(source, special_tokens=SPECIAL).render([SYSTEM, USER], tools=[TOOL], **DATE)
    expected = rendered_by_transformers(
        source, [SYSTEM, USER], tools=[TOOL], add_generation_prompt=True, **DATE, **SPECIAL
    )
    assert text == expected
    assert "Finds <a> & 'b' — ü" in text


def test_a_template_that_needs_tools_says_so(shared_data: Path) -> None:
    source = read_template(shared_data, HERMES)
    with pytest.raises(ValueError, match=r"chat template of model failed: TypeError: .*None"):
        ChatTemplate(source).render([USER])
    with pytest.raises(TypeError):
        rendered_by_transformers(source, [USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n"
        "{{ m.role }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
        "a{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}b{{ x }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ {'b': '<é>', 'a': 1} | tojson(indent=2, sort_keys=true) }}{{ ['é'] | tojson(true) }}",
        "{{ tools is none }}{{ undefined_name }}{{ bos_token }}{{ eos_token }}{{ pad_token }}",
        "{{ dict(a=1).items() | list }}{{ {'a': [1, (2, 'x')]} }}",
        "{{ messages[1:] }}{{ messages[::-1][0].role }}{{ 'abc'[:2] ~ 1 ~ none ~ [2] }}",
        "{% for m in messages if m.role == 'user' and 'W' in m.content %}{{ loop.length }}"
        "{{ m.content | trim }}{% else %}none{% endfor %}",
        "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}"
        "{{ loop.depth }}{{ x }}{% endif %}{% endfor %}",
        "{% macro m(x, y=[]) %}<{{ x }}{{ y }}{{ varargs }}{{ caller() if caller }}>{% endmacro %}"
        "{{ m(1) }}{{ m(1, 2, 3) }}{% call m(messages[0].role) %}inner{% endcall %}",
        "{% set x %}{{ bos_token }}b{% endset %}{{ x * 2 + 'c' }}{{ [1] * 2 + [3] }}"
        "{{ 2 ** 9 % 7 }}",
        "{{ [messages[:1], messages] | sum(start=[]) }}{{ [{'a': {'b': 2}}] | sum('a.b') }}",
        "{{ [1, 2.5] | sum(start=1) }}{{ messages | length }}",
        "{{ '%s-%05.1f|%(a)s' | replace('|%(a)s', '') | format('é', 2) }}{{ '%(a)s' % {'a': 3} }}",
        "{{ '{:>5}{a[role]}'.format(1, a=messages[0]) }}{{ 'x'.center(5) }}{{ 'a,b'.split(',') }}",
        "{{ messages | map(attribute='role') | join(', ') }}"
        "{{ ', '.join(messages | map('string')) }}",
        "{{ messages | groupby('role') | list }}{{ [3, 1] | sort | first }}{{ 7.25 | round(1) }}",
        "{{ 'a\nb' | indent(2) }}{{ 'a' | center(5) }}{{ [1, 2, 3] | batch(2, 0) | list }}",
        "{% autoescape true %}{{ '<' ~ '&' }}{{ '<b>' | safe ~ '<' }}{% endautoescape %}",
        "{{ [1, [2, {'b': 'é'}]] | tojson(indent=3, separators=(', ', '= ')) }}",
        "{% if not (1 < 2 <= 2 != 3) or 'a' in {'a': 1} %}{{ 4 is odd }}{% endif %}{{ 3 is odd }}",
    ],
)
def test_language_features_as_in_transformers(source: str) -> None:
    messages = [SYSTEM, USER]
    text = ChatTemplate(source, special_tokens=SPECIAL).render(messages)
    expected = rendered_by_transformers(source, messages, add_generation_prompt=True, **SPECIAL)
    assert text == expected


def test_strftime_now_gives_the_date() -> None:
    before = datetime.now().strftime("%Y")
    text = ChatTemplate("{{ strftime_now('%Y') }}").render([USER])
    assert before <= text <= datetime.now().strftime("%Y")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ range(100000000) | list }}",
        "{% include 'other.jinja' %}",
    ],
)
def test_the_sandbox_refuses(source: str) -> None:
    with pytest.raises(ValueError, match="chat template of here failed: ") as caught:
        ChatTemplate(source, origin="here").render([USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "'' | attr('__class__')",
        "''['__class__']",
        "'{0.__class__}'.format(1)",
        "raise_exception.__globals__",
        "strftime_now.__code__",
        "namespace.__init__",
        "(messages | map(attribute='__class__') | list)[0]",
    ],
)
def test_attributes_with_an_underscore_are_empty(expression: str) -> None:
    assert ChatTemplate(f"[{{{{ {expression} }}}}]").render([USER]) == "[]"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "failed: roles must alternate"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "failed: TypeError: "),
        ("{{ nothing.here }}", "failed: 'nothing' is undefined"),
        ("{% if %}", "failed: Expected an expression"),
        ("{% generation %}x", "failed: Unexpected end of template"),
    ],
)
def test_errors_of_a_template_are_one_line(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        ChatTemplate(source).render([USER])
    assert "\n" not in str(caught.value)


def test_messages_are_checked_and_never_changed() -> None:
    template = ChatTemplate("{{ messages[0].role }}")
    for bad in ([{"content": "x"}], ["hello"]):
        with pytest.raises(ValueError, match="message 0 of the chat must"):
            template.render(bad)
    with pytest.raises(ValueError, match="only text, numbers"):
        template.render([{"role": object()}])


def test_where_a_template_is_found(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert find_chat_template(tmp_path, {}) is None
    assert find_chat_template(tmp_path, {"chat_template": None}) is None
    assert find_chat_template(tmp_path, {"chat_template": "t"}) == "t"
    assert find_chat_template(tmp_path, {"chat_template": several}) == "d"
    assert find_chat_template(tmp_path, {"chat_template": several[:1]}) is None
    with pytest.raises(ValueError, match="chat_template is neither"):
        find_chat_template(tmp_path, {"chat_template": 3})
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert find_chat_template(tmp_path, {"chat_template": "t"}) == "file"
