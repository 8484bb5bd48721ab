"""A model directory's jinja chat template, rendered in a sandbox as transformers does it, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorasmith.errors import DataError, FamilyError

SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, never meant for text: they stand around what `{% generation %}` encloses."""


class ChatTemplate:
    """Source: transformers/utils/chat_template_utils.py (5.x), whose conventions templates are written for.

    `variables` are bos_token, eos_token, ... ; `now` is what strftime_now tells: one moment for the whole
    format, so that a prompt at midnight equals the one before.

    Raises: FamilyError if the template is not jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], now: datetime | None = None) -> None:
        now = now or datetime.now()
        self._made_of = (source, dict(variables), now)
        self._variables = dict(variables)
        try:
            self._template = _environment(now).from_string(source)
        except TemplateSyntaxError as error:
            raise FamilyError(
                "the model's chat template is not valid jinja",
                where=f"chat template, line {error.lineno}",
                why=str(error.message),
                fix="get the model's chat_template.jinja and tokenizer_config.json again",
            ) from None
        # jinja keeps a chain of maps here, and walks it at every rendering: a third of the time.
        self._template.globals = dict(self._template.globals)

    def __reduce__(self) -> tuple[Any, ...]:
        """jinja's own objects do not travel to another process: there it is made anew, at the same moment."""
        return ChatTemplate, self._made_of

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as one string, with the span marks still in it.

        Raises: DataError if the template refuses these messages.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(
                "the model's chat template refuses this conversation",
                why=f"{type(error).__name__}: {error}",
                fix="check the order of roles, and whether the model takes a system message",
            ) from None


def take_spans(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """The string without span marks, and the (start, end) that they enclosed."""
    head, *rest = rendered.split(SPAN_START)
    text, spans = head.replace(SPAN_END, ""), []
    for part in rest:
        inside, _, after = part.partition(SPAN_END)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after.replace(SPAN_END, "")
    return text, spans


class _GenerationSpans(Extension):
    """The `{% generation %}` tag of transformers: it encloses what the model is to write."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        return SPAN_START + caller() + SPAN_END


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    extensions: list[type[Extension] | str] = [_GenerationSpans, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = now.strftime
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
