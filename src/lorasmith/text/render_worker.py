"""The process in which a model directory's chat template runs: jinja2 and nothing else of ours or of torch.

jinja's sandbox keeps a template from reading and calling; it does not keep it from running for ever or from
filling the memory. Here the kernel does, and what comes back is text (JSON), never an object.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import IO, Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, never meant for text: they stand around what `{% generation %}` encloses."""
CPU_SECONDS = 2.0
"""For one rendering; ordinary ones take a ten-thousandth of it."""
MOST_MEMORY = 2**30
MOST_CHARACTERS = 4 * 2**20
"""Of one rendering, besides sixteen times what the conversation itself has."""
OUT_OF_MEMORY, TOO_LONG = "out of memory", "too long"
_LENGTH = struct.Struct("<Q")
_LONGEST_REASON = 1000


def send(pipe: IO[bytes], message: Any) -> None:
    data = json.dumps(message).encode()
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes], most_bytes: int | None = None) -> Any:
    """Raises: EOFError if the other side has gone; ValueError for a message longer than `most_bytes`."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError("the pipe was closed")
    (length,) = _LENGTH.unpack(head)
    if most_bytes is not None and length > most_bytes:
        raise ValueError(f"a message of {length:,} bytes")
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError("the pipe was closed")
    return json.loads(data)


def main() -> None:
    """A template, then batches of [messages, add_generation_prompt], until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit_memory()
    try:
        made_of = receive(source)
        template, refusal = _compiled(made_of["source"], datetime.fromisoformat(made_of["now"]))
        send(sink, refusal)
        while template is not None:
            answers = [_answer(template, made_of["variables"], *asked) for asked in receive(source)]
            send(sink, answers)
    except (EOFError, BrokenPipeError):
        return


def _compiled(source: str, now: datetime) -> tuple[Template | None, dict[str, Any]]:
    """jinja computes constants while it compiles, so the limits hold here too."""
    _limit_time(CPU_SECONDS)
    try:
        template = _environment(now).from_string(source)
        # jinja keeps a chain of maps here, and walks it at every rendering: a third of the time.
        template.globals = dict(template.globals)
    except TemplateSyntaxError as error:
        return None, {"error": str(error.message)[:_LONGEST_REASON], "line": error.lineno}
    except MemoryError:
        return None, {"limit": OUT_OF_MEMORY}
    except Exception as error:  # whatever a compiler raises for a strange source, the parent tells
        return None, {"error": f"{type(error).__name__}: {error}"[:_LONGEST_REASON], "line": 1}
    finally:
        _limit_time(0)
    return template, {}


def _answer(
    template: Template, variables: Mapping[str, str], messages: list[dict[str, str]], prompt: bool
) -> dict[str, str]:
    _limit_time(CPU_SECONDS)
    try:
        text = template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **variables
        )
    except MemoryError:
        return {"limit": OUT_OF_MEMORY}
    except Exception as error:  # the template's own refusals, and its mistakes
        return {"error": f"{type(error).__name__}: {error}"[:_LONGEST_REASON]}
    finally:
        _limit_time(0)
    if len(text) > MOST_CHARACTERS + 16 * sum(len(message["content"]) for message in messages):
        return {"limit": TOO_LONG}
    return {"text": text}


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # Windows has no such module, macOS refuses the limit
        return


def _limit_time(seconds: float) -> None:
    """SIGPROF is left to its default, which ends the process whatever it is computing; 0: no limit."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


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


if __name__ == "__main__":
    main()
