"""Write docs/reference/ from the code: write_reference.py [--check]

config.md comes from the pydantic sections, cli.md from the parameters of the verbs, errors.md from the
exception tree. With --check nothing is written, and the exit code is 1 if a page is not what would be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.main
import yaml
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from lorasmith import errors
from lorasmith.cli.main import app
from lorasmith.config import GenerateConfig, RunConfig, validate

OUT = Path(__file__).resolve().parents[1] / "docs" / "reference"
GENERATED = "<!-- Written by scripts/write_reference.py (make docs). Do not edit. -->"

RECIPE = """\
model:
  path: deepseek-ai/deepseek-llm-7b-chat
data:
  train: huanhuan.json
  eval: 0.02
  max_length: 384
lora:
  r: 8
  lora_alpha: 32
  target_modules: auto
train:
  output_dir: runs/huanhuan
  batch_size: 16
  learning_rate: 1e-4
  num_epochs: 3
"""
_NOUNS = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}
_BOUNDS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "at most {}"}


def main(arguments: Sequence[str]) -> int:
    pages = {"config.md": config_page(), "cli.md": cli_page(), "errors.md": errors_page()}
    stale = [name for name, text in pages.items() if not _is(OUT / name, text)]
    if "--check" in arguments:
        for name in stale:
            print(f"docs/reference/{name} is not what the code says: run make docs", file=sys.stderr)
        return 1 if stale else 0
    OUT.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (OUT / name).write_text(text, encoding="utf-8")
    return 0


def config_page() -> str:
    validate(RunConfig, yaml.safe_load(RECIPE.replace("1e-4", "1.0e-4")), where="RECIPE")
    sections = [(name, field.annotation) for name, field in RunConfig.model_fields.items()]
    return _page(
        "Config reference",
        "A recipe is a YAML file of four sections. Every key may be left out, except `model.path`,",
        "`data.train` and `train.output_dir`, which the command line may give instead. An unknown key is an",
        "error. `--set train.learning_rate=2e-4` lays one key over the file; its value is read as YAML.",
        "",
        f"```yaml\n{RECIPE}```",
        *[line for name, section in sections for line in _section(f"`{name}`", f"{name}.", section)],
        *_section("Sampling", "", GenerateConfig),
        "Sampling is no section of a recipe: its keys are options of `lorasmith chat` and `generate`",
        "(`--max-new-tokens`), and in Python `ls.chat(model, messages, generate=ls.GenerateConfig(...))`.",
    )


def _section(title: str, prefix: str, section: Any) -> Iterator[str]:
    yield from ("", f"## {title}", "", section.__doc__, "")
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for name, field in section.model_fields.items():
        default = _cell(f"`{_written(field)}`")
        meaning = _cell(field.description or "")
        yield f"| `{prefix}{name}` | {_cell(_words_of(field))} | {default} | {meaning} |"
    yield ""


def _words_of(field: FieldInfo) -> str:
    return in_words(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)


def in_words(kind: Any) -> str:
    """A type as people say it: `Annotated[int, Gt(0)] | None` -> "whole number above 0, or null"."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [bound for constraint in parts[1:] for bound in _bounds(constraint)]
        return " ".join([in_words(parts[0]), " and ".join(bounds)]).strip()
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in parts)
    if origin in (Union, UnionType):
        return ", or ".join(in_words(part) for part in parts)
    if origin is list:
        return f"list of {_PLURALS[parts[0]]}"
    if origin is dict:
        return f"map of {_PLURALS[parts[0]]} to {_PLURALS[parts[1]]}"
    return _NOUNS[kind]


def _bounds(constraint: Any) -> Iterator[str]:
    for part in getattr(constraint, "metadata", [constraint]):
        yield from (
            text.format(_number(getattr(part, key))) for key, text in _BOUNDS.items() if hasattr(part, key)
        )


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _written(field: FieldInfo) -> str:
    """A default as YAML has it."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, float):
        return f"{value:g}"
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    return text.removesuffix("...\n").strip().replace("''", '""')


def cli_page() -> str:
    group = typer.main.get_command(app)
    return _page(
        "Command line reference",
        "`lorasmith VERB --help` shows the same in the terminal. `lorasmith --version` prints the version.",
        "`--debug`, anywhere on the line, shows the traceback of an error. Exit codes: [errors](errors.md).",
        *[line for path, verb in _verbs("lorasmith", group) for line in _verb(path, verb)],
    )


def _verbs(path: str, group: Any) -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if isinstance(command, TyperGroup):
            yield from _verbs(f"{path} {name}", command)
        else:
            yield f"{path} {name}", command


def _verb(path: str, verb: Any) -> Iterator[str]:
    shown = [p for p in verb.params if p.name != "help"]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    names = [_argument(p) if p.required else f"[{_argument(p)}]" for p in arguments]
    yield from ("", f"## {path}", "", f"```\n{' '.join([path, *names, '[OPTIONS]'])}\n```", "")
    yield from (_cell(verb.help), "", "| argument or option | default | meaning |", "|---|---|---|")
    for parameter in shown:
        name = _argument(parameter) if parameter in arguments else _option(parameter)
        yield f"| `{name}` | {_default(parameter)} | {_cell(parameter.help or '')} |"
    yield ""


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option(parameter: Any) -> str:
    flags = ", ".join([*parameter.opts, *parameter.secondary_opts])
    value = parameter.metavar or parameter.opts[0].lstrip("-").replace("-", "_").upper()
    return flags if parameter.is_flag else f"{flags} {value}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    said_nothing = parameter.default is None or parameter.default is False or parameter.default == ""
    return "" if said_nothing else f"`{parameter.default}`"


def errors_page() -> str:
    tree = (errors.__doc__ or "").partition("\n\n")[2].strip()
    return _page(
        "Errors and exit codes",
        "A known error prints what happened, where, why, and what to do, without a traceback, to standard",
        "error. All of them are subclasses of `lorasmith.LorasmithError` (`what`, `where`, `why`, `fix`).",
        "",
        f"```\n{tree}\n```",
        "",
        "| exit code | class | also caught as |",
        "|---|---|---|",
        *[_error_row(error) for error in _tree_of(errors.LorasmithError)],
        "",
        "Besides these: 0 for success; 2 for an unknown verb or option, or a missing one; 3 where a verb of",
        "`lorasmith data` prints its whole report and a row of it would stop training; 4 where `doctor` or",
        "`verify` prints its whole report and a line of it failed; 130 for Ctrl-C. Exit",
        "code 1 with a traceback is a fault of ours: please report it. `--debug` shows the traceback of a",
        "known error; its exit code stays.",
    )


def _tree_of(error: type[errors.LorasmithError]) -> Iterator[type[errors.LorasmithError]]:
    for below in error.__subclasses__():
        yield below
        yield from _tree_of(below)


def _error_row(error: type[errors.LorasmithError]) -> str:
    names = [base.__name__ for base in error.__mro__[1:] if issubclass(base, Exception)]
    also = [f"`{name}`" for name in names if name != "Exception"]
    return f"| {error.exit_code} | `{error.__name__}` | {', '.join(also)} |"


def _page(title: str, *lines: str) -> str:
    text = "\n".join([f"# {title}", "", GENERATED, "", *lines])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
