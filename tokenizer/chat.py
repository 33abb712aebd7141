"""Chat templates: the jinja2 programs that come with a model, run in a sandbox.

A template is a stranger's program. It sees plain data only, cannot reach attributes with an
underscore nor change what it is given, has bounds on memory and time, and whatever it does wrong
ends in a ValueError of one line.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser

from .paths import check_regular, read_text
from .template_environment import BoundedEnvironment
from .visible import one_line

MOST_INDENT = 64  # of JSON
MOST_FORMAT = 200  # characters of a date's format
MOST_REASON = 300  # characters of an error that a template chose


class ChatTemplate:
    """A chat template and the names of special tokens that it may use."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str] | None = None, origin: str = "model"
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._origin = origin

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Returns the conversation as the text that the model was trained on.

        `variables` are handed to the template (`tools`, `enable_thinking`, `date_string`...).
        Raises ValueError when a message has no role, when something is not plain data, and for
        any error of the template, its own `raise_exception` included.
        """
        given = {"tools": None, "documents": None, **self.special_tokens, **variables}
        data = _plain_data({**given, "messages": _checked(messages)})
        data["add_generation_prompt"] = add_generation_prompt
        environment = self._environment
        try:
            with environment.bounded(data):
                return self._template.render(data)
        except Exception as error:
            raise self._failure(error) from error

    @cached_property
    def _environment(self) -> BoundedEnvironment:
        return _environment()

    @cached_property
    def _template(self) -> Template:
        return self._environment.from_string(self.source)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of variables that the template reads. ValueError for a broken template."""
        try:
            return frozenset(meta.find_undeclared_variables(self._environment.parse(self.source)))
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> ValueError:
        reason = one_line(str(error)[: 4 * MOST_REASON])[:MOST_REASON] or "no reason given"
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        return ValueError(f"the chat template of {self._origin} failed: {kind}{reason}")


class Shield:
    """Covers names of special tokens in messages, so that they come out of a template as text.

    Each is replaced by digits that no message holds, which templates pass on unchanged.
    """

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted(names, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._covered: list[str] = []
        self._key = ""

    @property
    def is_used(self) -> bool:
        return bool(self._covered)

    def cover(self, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The messages with all their texts but the roles covered."""
        written = json.dumps(_plain_data({"messages": list(messages)}), ensure_ascii=False)
        candidates = (str(seed * 7_654_321_012_345_678_901) for seed in itertools.count(1))
        self._key = next(key for key in candidates if key not in written)
        return [
            {k: v if k == "role" else self._cover(v) for k, v in message.items()}
            if isinstance(message, Mapping)
            else message
            for message in messages
        ]

    def uncover(self, text: str) -> str:
        """A part of the template's text with the names back in it."""
        return re.sub(
            rf"{self._key}(\d{{6}})", lambda match: self._covered[int(match.group(1))], text
        )

    def _cover(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._names.sub(self._cover_name, value)
        if isinstance(value, Mapping):
            return {key: self._cover(inner) for key, inner in value.items()}
        return [self._cover(v) for v in value] if isinstance(value, (list, tuple)) else value

    def _cover_name(self, match: re.Match[str]) -> str:
        self._covered.append(match.group())
        return f"{self._key}{len(self._covered) - 1:06d}"


def find_chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Returns the source of a directory's chat template, or None where it has none.

    A `chat_template.jinja` goes before the `chat_template` of `tokenizer_config.json`; of a list
    of named templates the one named "default" is taken. Raises ValueError for anything else.
    """
    file = directory / "chat_template.jinja"
    if file.exists() or file.is_symlink():  # a link to nothing is no reason to do without
        check_regular(file)
        return read_text(file, "a chat template")
    found = settings.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        named = [entry for entry in found if entry.get("name") == "default"]
        found = named[-1].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template is neither text nor a list "
            "of named templates"
        )
    return found


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant says, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@pass_environment
def _tojson(
    environment: BoundedEnvironment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the model was trained on it: jinja2's own filter escapes `<`, `>`, `&` and quotes."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > MOST_INDENT:
        raise SecurityError(f"it indents by more than {MOST_INDENT}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    return environment.concat(encoder.iterencode(value))  # counted as it grows


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MOST_FORMAT:
        raise SecurityError(f"it gives strftime_now more than {MOST_FORMAT} characters")
    return datetime.now().strftime(format)


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"message {number} of the chat must be a mapping with a role")
    return [dict(message) for message in messages]


def _plain_data(value: dict[str, Any]) -> dict[str, Any]:
    """A copy made of plain JSON types, so that no method of the caller's objects is in reach."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a chat may hold only text, numbers, lists and mappings: {error}"
        ) from None
    return copy
