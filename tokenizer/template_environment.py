"""jinja2's sandbox with bounds: every loop, call, filter and new value of a template is counted.

What a template writes does not change.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .template_budget import Budget
from .template_counting import KEEP, PART, STEP, Counting
from .template_sizes import check_filter, check_method, check_operator

MOST_SOURCE = 500_000  # characters of a template


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates run within the `Budget` that `bounded` opens."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        # constants are not folded when a template is compiled, which is outside the bounds
        super().__init__(optimized=False, finalize=_written, **options)
        self._local = threading.local()
        del self.globals["lipsum"], self.filters["random"]  # not the same on every rank
        self.globals["namespace"] = _GuardedNamespace
        self.filters["sum"] = _sum
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        for name, test in list(self.tests.items()):
            self.tests[name] = self._counted(test)
        self.filters |= {STEP: self._step, KEEP: self._keep, PART: self._part}

    @property
    def budget(self) -> Budget:
        """The budget of the rendering that runs on this thread."""
        budget: Budget = self._local.budget
        return budget

    @contextmanager
    def bounded(self, data: Any = None) -> Iterator[None]:
        """Within it, templates are compiled and rendered with `data`."""
        self._local.budget = Budget(data)
        try:
            yield
        finally:
            del self._local.budget

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MOST_SOURCE:
            raise SecurityError(f"it has more than {MOST_SOURCE:,} characters")
        parsed: nodes.Template = Counting().visit(super()._parse(source, name, filename))
        return parsed

    def concat(self, parts: Iterable[str]) -> str:
        """The text of a template, a macro or a block."""
        pieces, length = [], 0
        for piece in parts:
            length += len(piece)
            self.budget.check(length)
            pieces.append(piece)
        text: str = self.budget.keep("".join(pieces))
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operator(self.budget, operator, left, right)
        return self.budget.keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __called: Any, *args: Any, **kwargs: Any) -> Any:
        # names with underscores leave all others to the arguments of a template's call
        budget = __self.budget
        budget.step()
        method = getattr(__called, "__wrapped__", __called)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            given = list(args)
            check_method(budget, owner, name, given, kwargs)
            result = super().call(__context, __called, *given, **kwargs)
        else:
            budget.size([args, kwargs])
            result = super().call(__context, __called, *args, **kwargs)
            if isinstance(owner, (list, tuple, dict)) and name != "copy":
                return result  # what is in there already, or a view of it
        return budget.keep(result)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, which checks first how large its result would be."""
        n_before = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            given = list(args[n_before:])
            check_filter(self.budget, name, given, kwargs)
            result = function(*args[:n_before], *given, **kwargs)
            return result if any(result is value for value in given) else self.budget.keep(result)

        self.filters[name] = guarded

    def _counted(self, function: Any) -> Callable[..., Any]:
        """A test that is a step."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            return function(*args, **kwargs)

        return counted

    def _step(self, n_bytes: int) -> bool:
        self.budget.step()
        self.budget.charge(n_bytes)
        return True

    def _keep(self, value: Any) -> Any:
        return self.budget.keep(value)

    def _part(self, value: Any) -> Any:
        """A value that is about to be joined to others, and then takes memory once more."""
        self.budget.charge(len(value) if isinstance(value, str) else 4 * self.budget.size(value))
        return value


class _GuardedNamespace(Namespace):
    """jinja2's `namespace`, which would take names with an underscore, and show all that it holds.

    It can hold itself, so whatever goes through a value ends here.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _refuse_underscore(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r} on a namespace")


@pass_environment
def _written(environment: BoundedEnvironment, value: Any) -> Any:
    """A value that is about to be written as text."""
    if not isinstance(value, str):
        environment.budget.step()
        environment.budget.charge(4 * environment.budget.size(value))
    return value


@pass_environment
def _sum(
    environment: BoundedEnvironment,
    iterable: Iterable[Any],
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    """The filter `sum`, as additions that are counted one by one."""
    if isinstance(start, (str, bytes)):
        raise TypeError("sum adds no texts: use join")
    total = start
    for item in iterable:
        environment.budget.step()
        value = item
        for name in () if attribute is None else str(attribute).split("."):
            value = environment.getitem(value, int(name) if name.isdigit() else name)
        total = environment.call_binop(None, "+", total, value)
    return total
