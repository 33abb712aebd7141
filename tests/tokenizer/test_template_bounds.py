"""Chat templates that ask for terabytes or for years, in a process that may take 1 GiB and 20 s."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shardlens.tokenizer.chat import ChatTemplate

MOST_BYTES, MOST_SECONDS = 2**30, 20
BIG = "{% set ns = namespace(x='ab' * 1000) %}"
DOUBLING = "{% for i in range(60) %}{% set ns.x = DOUBLED %}{% endfor %}"
SIZES = {
    "product": "{{ 'a' * 10**10 }}",
    "product of a list": "{{ [0] * 10**9 }}",
    "product of big lists": "{{ [['a' * 4000] * 200] * 200 }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (10**10, 1) }}",
    "percent of a fraction": "{{ '%.1000000000f' % 1.5 }}",
    "percent many times": "{{ ('%s' * 900000) % (('a' * 3000000,) * 9) }}",
    "percent by name": "{{ ('%(a)s' * 9000) % {'a': 'a' * 9000} }}",
    "the filter format": "{{ '%10000000000d' | format(1) }}",
    "the filter format by name": "{{ '%(a)10000000000d' | format(a=1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format with a width": "{{ '{:{}}'.format(1, 10**10) }}",
    "format of a mapping": "{{ '{a:10000000000}'.format_map({'a': 1}) }}",
    "format many times": "{{ ('{0}' * 90000).format('a' * 90000) }}",
    "format by attribute": "{{ ('{:9999999999}' | attr('format'))(1) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "center, folded": "{{ 'a' | center(10000000000) }}",
    "center of a text": "{{ 'a'.center(10**9) }}",
    "rjust": "{{ 'a'.rjust(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "zfill of bytes": "{{ 'a'.encode().zfill(10**9) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10**7) }}",
    "expandtabs by name": "{{ ('\\t' * 1000).expandtabs(tabsize=10**7) }}",
    "to_bytes": "{{ (5).to_bytes(10**10, 'big') }}",
    "translate": "{{ ('a' * 90000).translate({97: 'b' * 90000}) }}",
    "replace": "{{ ('a' * 90000).replace('a', 'b' * 90000) }}",
    "the filter replace": "{{ ('a' * 90000) | replace('a', 'b' * 90000) }}",
    "replace of nothing": "{{ ('a' * 90000) | replace('', 'b' * 90000) }}",
    "join": "{{ ('b' * 90000).join(range(99999) | map('string')) }}",
    "the filter join": "{{ range(99999) | join('b' * 90000) }}",
    "join of a list": "{{ (['b' * 90000] * 44) | map('replace', 'b', 'ccccc') | join }}",
    "indent": "{{ ('a\\n' * 90000) | indent(90000) }}",
    "indent by a text": "{{ ('a\\n' * 90000) | indent('b' * 90000) }}",
    "indent of JSON": "{{ [1] | tojson(indent=10**9) }}",
    "indent of deep JSON": BIG + "{% for i in range(90) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ([ns.x] * 900) | tojson(indent=64) }}",
    "separators": "{{ range(9999) | list | tojson(separators=('a' * 90000, ':')) }}",
    "wordwrap": "{{ ('a ' * 90000) | wordwrap(1, true, 'b' * 90000) }}",
    "wordwrap of a word": "{{ ('a' * 3900000) | wordwrap(1) }}",
    "pprint": "{{ ([[[[1] * 30] * 30] * 30] * 9) | pprint }}",
    "replace by name": "{{ (('a' * 90000) | safe) | replace(new='b' * 90000, old='a') }}",
    "replace of safe text": "{{ ('a' * 90000) | safe | attr('replace') }}"
    "{{ (('a' * 90000) | safe).replace(new='b' * 90000, old='a') }}",
    "join of safe text": "{{ (('a' * 90000) | safe).join(seq=['b'] * 90000) }}",
    "percent of safe text": "{{ ('%10000000000d' | safe) % 1 }}",
    "indent by name": "{{ ('a\n' * 90000) | indent(first=1, width=90000) }}",
    "a codec by name": "{{ ('\u00e9\u4e00' * 190000).encode(errors='x', encoding='punycode') }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "sum": "{{ ([['a']] * 90000) | sum(start=[]) | length }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "power of powers": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "squares": "{% set ns = namespace(x=7) %}" + DOUBLING.replace("DOUBLED", "ns.x * ns.x"),
    "hexadecimal": "{{ ('f' * 3000000) | int(base=16) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "doubling": BIG + DOUBLING.replace("DOUBLED", "ns.x + ns.x"),
    "doubling of a join": BIG + DOUBLING.replace("DOUBLED", "ns.x ~ ns.x"),
    "doubling of lists": BIG + DOUBLING.replace("DOUBLED", "[ns.x, ns.x]"),
    "doubling of tuples": BIG + DOUBLING.replace("DOUBLED", "(ns.x, ns.x)") + "{{ ns.x == 1 }}",
    "doubling of mappings": BIG + DOUBLING.replace("DOUBLED", "{'a': ns.x, 'b': ns.x}"),
    "doubling of a cycler": BIG + DOUBLING.replace("DOUBLED", "cycler(ns.x, ns.x).items"),
    "doubling of a block": BIG
    + "{% for i in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = x %}{% endfor %}",
    "doubling of a macro": BIG
    + "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}"
    + DOUBLING.replace("DOUBLED", "m(ns.x)"),
    "doubling of arguments": BIG
    + "{% macro m() %}{% set ns.x = varargs %}{% endmacro %}"
    + "{% for i in range(60) %}{{ m(ns.x, ns.x) }}{% endfor %}{{ ns.x | string }}",
    "center of each": "{{ ['a'] | map('center', 10**9) | list }}",
    "format of each": "{{ (['{:9999999999}'] | map(attribute='format') | list)[0](1) }}",
    "one value for many keys": "{{ {}.fromkeys(range(99999), 'a' * 90000) | string }}",
    "a block, again and again": "{% block b %}{{ 'a' * 90000 }}{% endblock %}"
    + "{{ self.b() }}" * 99,
    "escapes": "{% autoescape true %}{{ ('<' * 3900000) ~ ('<' * 3900000) }}{% endautoescape %}",
    "deep keys": BIG
    + "{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns.a }}"
    "{{ 'a' * 10**10 }}",
    "views in a list": "{{ ([dict(a='b' * 90000).items()] * 90000) | string }}",
    "long joins": "{% set x = 'a' * 3999999 %}{{ " + " ~ ".join("x" * 300) + " }}",
    "many values": "{% set ns = namespace() %}{% for i in range(99) %}"
    + "".join(f"{{% set ns.x{i} = ('a' ~ i) * 1900000 %}}" for i in range(99))
    + "{% endfor %}",
    "many copies": "{% set x = range(99999) | list %}"
    + "".join(f"{{% set x{i} = x[:] %}}" for i in range(200)),
    "output": "{% for i in range(99999) %}" + "long " * 99 + "{% endfor %}",
    "output of a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "long " * 99
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "deep nesting": BIG + "{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "source": "{{ 1 }}" * 90000,
    "source in brackets": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "a date": "{{ strftime_now('%Y' * 10**6) }}",
    "a reason": "{{ raise_exception('\\x1b]0;x' * 10**5) }}",
}
RECURSION = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
TIMES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops with a test": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}"
    "{% endfor %}{% endfor %}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "recursion": RECURSION + "{{ m(60) }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "filters": "{% for i in range(99999) %}"
    "{{ range(99999) | map('string') | map('upper') | select | list | length }}{% endfor %}",
    "slow filters": "{{ (['ab' * 1900000] * 1) | map('upper') | list | length }}"
    "{% for i in range(99999) %}{{ ('ab' * 190000) | upper | length }}{% endfor %}",
    "comparisons": "{% set x = 'a' * 3999999 %}{% set y = ('a' * 3999998) ~ 'a' %}"
    "{% for i in range(99999) %}{% for j in range(999) if x == y and y == x %}{% endfor %}"
    "{% endfor %}",
    "a search backwards": "{{ ('a' * 3900000).rfind('b' + 'a' * 1000000) }}",
    "a strip": "{{ ('a' * 3900000).strip('bcdefgh' * 100000 ~ 'a') }}",
    "punycode": "{{ ('\\u00e9\\u4e00' * 190000).encode('punycode') | length }}",
    "sorting": "{% set x = range(99999) | list %}{% for i in range(99999) %}"
    "{{ x | sort(reverse=true) | first }}{% endfor %}",
}
PROGRAM = f"""
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, ({MOST_BYTES}, {MOST_BYTES}))
resource.setrlimit(resource.RLIMIT_CPU, ({MOST_SECONDS * 20}, {MOST_SECONDS * 20}))
from shardlens.tokenizer.chat import ChatTemplate
for source in json.load(sys.stdin):
    start = time.monotonic()
    try:
        said = ChatTemplate(source).render([{{"role": "user", "content": "hi"}}])[:100]
    except ValueError as error:
        said = ["refused", str(error)]
    print(json.dumps([said, time.monotonic() - start]), flush=True)
"""


def run_bounded(sources: list[str]) -> list[Any]:
    """The result of each template, and its seconds, in a process with bounds."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(sources), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check_refused(found: dict[str, Any]) -> None:
    for name, (said, seconds) in found.items():
        assert said[0] == "refused", f"{name} gave {said!r}"
        assert seconds < MOST_SECONDS, f"{name} took {seconds:.1f} s"
        assert len(said[1].splitlines()) == 1 and said[1].isprintable() and len(said[1]) < 500
        assert "MemoryError" not in said[1], name


def test_sizes_are_bounded() -> None:
    check_refused(dict(zip(SIZES, run_bounded(list(SIZES.values())), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMES)
def test_time_is_bounded(name: str) -> None:
    check_refused({name: run_bounded([TIMES[name]])[0]})


def test_ranks_that_share_a_template_have_a_budget_each() -> None:
    template = ChatTemplate("{% for i in range(9000) %}{{ 'a' * 9 }}{% endfor %}")
    with ThreadPoolExecutor(4) as threads:
        rendered = [threads.submit(template.render, [{"role": "user"}]) for _ in range(64)]
        assert {future.result() for future in rendered} == {"a" * 81_000}


@pytest.mark.parametrize("n", [1, 600])
def test_a_long_conversation_is_within_bounds(n: int) -> None:
    """600 turns of 2,000 characters, each joined to all before it, and each looked for in all."""
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text + m.content[:500] %}{% set others = messages[loop.index:] %}"
        "{{ m.role ~ ': ' ~ (m.content | replace('x', 'xy') | trim) }}{{ others | length }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "x " * 1000}] * n
    text = ChatTemplate(source).render(messages)
    assert text.count("user: xy xy") == n and len(text) > 2_500 * n


def test_an_error_shows_its_control_characters() -> None:
    source = "{{ raise_exception('a\x1b]0;b\x07 \u202e\u009b c\n d') }}"
    with pytest.raises(ValueError) as caught:
        ChatTemplate(source).render([{"role": "user"}])
    said = "failed: a<1B>]0;b<07> <202E><009B> c d"
    assert str(caught.value).endswith(said)
