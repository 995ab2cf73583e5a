# SPDX-License-Identifier: Apache-2.0
"""A model's chat template: it renders messages as the text format that the model was trained on.

The templates are Jinja, rendered as in Hugging Face's transformers (utils/chat_template_utils.py): in a sandbox, with
trim_blocks and lstrip_blocks, loop controls, {% generation %}, and the functions raise_exception, strftime_now and
tojson.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sw.common.errors import UserError, one_line

MAX_STEPS = 2_000_000
"""Maximum number of Python lines that rendering may run. Real templates need some thousands."""
MAX_SIZE = 1_000_000
"""Maximum number of elements of a repeated text or list, and of bits of a power."""


class TooMuchWork(Exception):
    """A template does not end in reasonable time."""


class _Environment(ImmutableSandboxedEnvironment):
    """Also limits the two operators that make large values from small ones."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for values, count in ((left, right), (right, left)):
                if hasattr(values, "__len__") and isinstance(count, int) and len(values) * count > MAX_SIZE:
                    raise TooMuchWork(f"it repeats a value {count} times")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_SIZE:
            raise TooMuchWork(f"it computes {left} ** {right}")
        return super().call_binop(context, operator, left, right)


def _bounded(render: Callable[[], str]) -> str:
    """Calls a function that may run MAX_STEPS lines of Python. Raises TooMuchWork after that."""
    steps = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise TooMuchWork(f"it is not done after {MAX_STEPS:,} steps")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(before)


class ChatTemplate:
    """A compiled template.

    Parameters
    ----------
    source: the template's text.
    path: the file of the template, for messages.

    Raises UserError if the source is not a template.
    """

    def __init__(self, source: Any, path: Path):
        self.path = path
        if not isinstance(source, str):
            raise UserError(f"{path}: the chat template is not text")
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except Exception as error:
            raise UserError(f"{path}: the chat template is damaged ({one_line(error)})") from None

    def render(self, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
        """The text up to the beginning of the assistant's answer.

        messages: dicts with role and content. special_tokens: their texts by name, for example bos_token.
        Raises UserError if the template refuses the messages, or does not end in reasonable time.
        """
        try:
            # Templates test whether tools and documents are none.
            values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
            return _bounded(lambda: self._template.render({**special_tokens, **values}))
        except TooMuchWork as error:
            raise UserError(f"{self.path}: the chat template takes too much work: {error}") from None
        except Exception as error:
            raise UserError(f"{self.path}: the chat template refuses the messages ({one_line(error)})") from None


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the text that a model is trained on; it renders its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False
) -> str:
    # Jinja's own filter escapes HTML and sorts keys.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
