# SPDX-License-Identifier: Apache-2.0
"""A model's chat template: messages to the text that the model was trained on.

Jinja as Hugging Face's transformers renders it (utils/chat_template_utils.py): sandboxed, block lines take no room,
loop controls and {% generation %}, and the functions raise_exception, strftime_now and tojson.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sw.common.errors import UserError, one_line


class ChatTemplate:
    """A compiled template.

    Parameters
    ----------
    source: the template's text.
    path: of the file that it is from, for messages.

    Raises UserError if it is no template.
    """

    def __init__(self, source: Any, path: Path):
        self.path = path
        if not isinstance(source, str):
            raise UserError(f"{path}: the chat template is not text")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except Exception as error:
            raise UserError(f"{path}: the chat template is damaged ({one_line(error)})") from None

    def render(self, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
        """The text up to where the assistant's answer begins.

        messages: with role and content. special_tokens: their texts by name, bos_token for example.
        Raises UserError if the template refuses the messages.
        """
        try:
            # Templates ask whether tools and documents are none.
            values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
            return self._template.render({**special_tokens, **values})
        except Exception as error:
            raise UserError(f"{self.path}: the chat template refuses the messages ({one_line(error)})") from None


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what a model is trained on; here it is only its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys=False
) -> str:
    # Jinja's own escapes what HTML needs escaped, and its keys are sorted.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
