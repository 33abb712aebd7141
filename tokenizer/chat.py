"""Chat templates: the jinja2 programs that come with a model, run in a sandbox.

A template is a stranger's program. It sees plain data only, cannot reach attributes with an
underscore nor change what it is given, and whatever it does wrong ends in a ValueError of one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


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
        try:
            return self._template.render(data)
        except Exception as error:
            raise self._failure(error) from error

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self.source)

    def _failure(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        return ValueError(f"the chat template of {self._origin} failed: {kind}{reason}")


def find_chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Returns the source of a directory's chat template, or None where it has none.

    A `chat_template.jinja` goes before the `chat_template` of `tokenizer_config.json`; of a list
    of named templates the one named "default" is taken. Raises ValueError for anything else.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
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


class _GuardedNamespace(Namespace):
    """jinja2's `namespace`, which would take a name with an underscore from a template."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _refuse_underscore(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _GuardedNamespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the model was trained on it: jinja2's own filter escapes `<`, `>`, `&` and quotes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r} on a namespace")


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"message {place} of the chat must be a mapping with a role")
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
