"""lorasmith doctor: is this machine, and this model directory, fit to train with?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.errors import SetupError

if TYPE_CHECKING:
    from rich.console import Console

    from lorasmith.doctor.check import Check

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_WIDTH = 20


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model directory, a hub name in the cache, or a run."),
    ] = None,
    *,
    adapter: Annotated[str | None, typer.Option(help="Adapter directory over this model.")] = None,
    output_dir: Annotated[str, typer.Option("--output-dir", "-o", help="Where runs will be.")] = "runs",
    deep: Annotated[bool, typer.Option("--deep", help="Also read all weights for their sha256.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Check machine, libraries, disk and model; offline, downloads nothing."""
    from rich.console import Console

    from lorasmith.doctor.check import worst
    from lorasmith.doctor.examine import Request, examine

    console = Console(highlight=False, soft_wrap=True)
    checks = []
    for check in examine(Request(model, adapter, output_dir, deep)):
        checks.append(check)
        if not json_:
            _say(console, check)
    if json_:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
    else:
        counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
        console.print(", ".join(f"{count} {status}" for status, count in counts.items()), markup=False)
    if worst(checks) == "fail":
        raise typer.Exit(SetupError.exit_code)


def _say(console: Console, check: Check) -> None:
    """One aligned line; a remedy on a line of its own below it."""
    console.print(f"{check.status:<5}", style=_STYLES[check.status], end="", markup=False)
    console.print(f"{check.name:<{_WIDTH}} {check.found}", markup=False)
    if check.remedy:
        console.print(f"{'':<5}{'':<{_WIDTH}} do: {check.remedy}", style="dim", markup=False)
