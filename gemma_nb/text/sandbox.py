"""Jinja templates of strangers: what they can reach, and how much they may compute.

A chat template is a program that came with a checkpoint.  Jinja's sandbox keeps it from Python's
insides; what is added here keeps it from running on for ever or filling the memory: every loop
round, call, filter and operator takes from one budget, and nothing may grow beyond a size.  The
environment is otherwise the one that transformers renders chat templates in.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What one rendering may do.  A conversation of 1,000 turns takes some 10,000 steps.
_STEPS = 300_000
_CALL = 8  # steps of a call or a filter
_LARGEST = 1 << 24  # characters of a text, items of a list
_CHARACTERS = 1024  # as many of a new text count as one step
_LONGEST_SOURCE = 1 << 20  # characters of a template; the longest of a known model has 20,000

# What may make much out of little: texts repeated, filled up or put between others.
_AMPLIFY = frozenset(
    {
        *("replace", "join", "format", "format_map", "translate", "expandtabs"),
        *("ljust", "rjust", "center", "zfill", "indent", "batch", "slice", "round"),
        *("tojson", "xmlattr", "wordwrap", "sum", "urlize"),
    }
)
_WIDE = re.compile(r"\d{5,}|\*|:[^{}]*\{")
_left: ContextVar[int] = ContextVar("steps left")


class TemplateFault(Exception):
    """A chat template that cannot be read or rendered; the message says why."""


class Program:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        """Reads it.

        Raises:
          TemplateFault: it is no Jinja template.
        """
        if len(source) > _LONGEST_SOURCE:
            raise TemplateFault(f"it has {len(source):,} characters, which no chat template has")
        try:
            tree = _environment.parse(source)
            _meter(tree)
            code = _environment.compile(tree)
            assert not isinstance(code, str)
            self._template = _environment.template_class.from_code(
                _environment, code, dict(_environment.globals)
            )
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFault(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # a compiler of strangers' input: whatever it stumbles over
            raise TemplateFault(f"{type(error).__name__}: {error}") from None

    def render(self, now: datetime.datetime, values: Mapping[str, Any]) -> str:
        """The text that the template makes of `values`.

        Args:
          now: what it is told where it asks for the time.
          values: texts, numbers, lists and dictionaries, by the names that it uses.

        Raises:
          TemplateFault: it raised something, or did more than any chat template needs.
        """
        reset = _left.set(_STEPS)
        try:
            parts, size = [], 0
            clock = {"strftime_now": lambda form: now.strftime(str(form))}
            for part in self._template.generate({**clock, **values}):
                parts.append(part)
                size += len(part)
                if size > _LARGEST:
                    _too_much()
            return "".join(parts)
        except TemplateFault:
            raise
        except jinja2.TemplateError as error:  # also of `raise_exception`, which has its own words
            raise TemplateFault(error.message or type(error).__name__) from None
        except Exception as error:  # anything can happen inside: it is a program
            raise TemplateFault(f"{type(error).__name__}: {error}") from None
        finally:
            _left.reset(reset)


def _too_much() -> NoReturn:
    raise TemplateFault("it computes more than any chat template needs")


def _spend(steps: int = 1) -> None:
    left = _left.get() - steps
    if left < 0:
        _too_much()
    _left.set(left)


def _weigh(value: Any, most: int = _LARGEST) -> int:
    """Characters and items in a value, about `most` of them at most; a number is its own weight."""
    if isinstance(value, int | float):
        return abs(math.trunc(value)) if math.isfinite(value) else 1
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if not isinstance(value, list | tuple | set | frozenset):
        return 1
    total = len(value)
    for item in value:
        if total > most:
            break
        total += _weigh(item, most - total)
    return total


def _sized(value: Any) -> Any:
    """`value`, if it is no larger than what a template may have."""
    if isinstance(value, str | list | tuple | dict):
        size = len(value)
        if size > _LARGEST:
            _too_much()
        _spend(1 + size // _CHARACTERS)
    return value


def _rounds(items: Any) -> Iterator[Any]:
    """The items of a loop, each of which is a step."""
    for item in items:
        _spend()
        yield item


def _check_call(name: str, arguments: Sequence[Any]) -> None:
    """Refuses what would make something large, before it does."""
    _spend(_CALL)
    if name == "replace" and len(arguments) > 2:
        text, old, new = (str(argument) for argument in arguments[:3])
        size = len(text) + text.count(old) * len(new)
    elif name in _AMPLIFY:
        size = math.prod(1 + _weigh(argument) for argument in arguments)
    else:
        return
    if size > 4 * _LARGEST:
        _too_much()


def _check_format(text: object) -> None:
    """Refuses a format that fills up to a width which is long, or not known yet."""
    if _WIDE.search(str(text)):
        _too_much()


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call(self, context: Any, function: Any, /, *arguments: Any, **named: Any) -> Any:
        owner = getattr(function, "__self__", None)
        _check_call(getattr(function, "__name__", ""), (owner, *arguments, *named.values()))
        return _sized(super().call(context, function, *arguments, **named))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "%" and not numbers):
            # A power has no end; a format writes as many spaces as it says.
            _too_much()
        if operator == "*":
            sizes = _weigh(left) * _weigh(right)
            if sizes > _LARGEST and not isinstance(left, float) and not isinstance(right, float):
                _too_much()
        return _sized(super().call_binop(context, operator, left, right))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks a reply for whoever trains on it, and writes what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _meter(tree: nodes.Template) -> None:
    """Makes loops count their rounds, and texts that are put together their size."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, "_rounds")
    for block in tree.find_all(nodes.AssignBlock):
        block.filter = _filtered(block.filter, "_sized")
    for owner in list(tree.find_all(nodes.Node)):
        for field, value in owner.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(owner, field, _filtered(value, "_sized"))
            elif isinstance(value, list):
                value[:] = [
                    _filtered(item, "_sized") if isinstance(item, nodes.Concat) else item
                    for item in value
                ]


def _filtered(node: Any, name: str) -> nodes.Filter:
    line = node.lineno if node is not None else 1
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that spends from the budget."""

    first = int(hasattr(function, "jinja_pass_arg"))  # what Jinja passes: its environment, say

    def guarded(*arguments: Any, **named: Any) -> Any:
        _check_call(name, (*arguments[first:], *named.values()))
        if name == "format":
            _check_format(arguments[0])
        return _sized(function(*arguments, **named))

    for mark in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, mark):
            setattr(guarded, mark, getattr(function, mark))
    return guarded


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter is for HTML, and escapes what is a tag there."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _made() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    filters = {**environment.filters, "tojson": _to_json}
    for name in ("pprint", "random"):
        filters.pop(name, None)
    environment.filters = {name: _guarded(name, f) for name, f in filters.items()}
    environment.filters |= {"_rounds": _rounds, "_sized": _sized}
    environment.globals.pop("lipsum", None)
    environment.globals["raise_exception"] = _raise
    return environment


_environment = _made()
