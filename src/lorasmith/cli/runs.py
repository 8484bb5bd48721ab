"""lorasmith runs: the runs below a directory, how far each is, and which checkpoints verify."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from lorasmith.runs.listing import RunSummary

_DEFAULT = Path("runs")
_STYLES = {"running": "green", "finished": "bold", "stopped": "yellow", "damaged": "red"}
_COLUMNS = ("run", "state", "step", "loss", "held-out", "base", "data", "age", "size", "checkpoints")


def runs(
    directories: Annotated[
        list[Path] | None, typer.Argument(metavar="DIR...", help="Runs, or where they lie; default: runs.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every checkpoint and compare its hashes, not sizes only.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List runs: state, step, losses, and which checkpoints verify."""
    from lorasmith.runs.listing import find_runs, summarize

    for directory in directories or ():
        if not directory.is_dir():
            raise ConfigError(f"there is no directory {directory}", fix="check the path")
    places = [place for place in directories or [_DEFAULT] if place.is_dir()]
    found = [summarize(path, hashes=verify) for place in places for path in find_runs(place)]
    if json_:
        typer.echo(json.dumps([asdict(run) for run in found], default=str, ensure_ascii=False))
    elif not found:
        typer.echo(f"no runs in {', '.join(map(str, directories or [_DEFAULT]))}")
    else:
        _show(found)


def _show(found: list[RunSummary]) -> None:
    from rich.console import Console
    from rich.measure import Measurement

    console, table = Console(), _table(found)
    wide = console.options.update(max_width=1000)
    if not console.is_terminal:  # a pipe has no width to keep to
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)
    for run in found:
        if run.told:
            console.print(f"{run.path}: {run.told}", highlight=False, markup=False, soft_wrap=True)
        for step, problem in run.damaged.items():
            text = f"{run.path}/checkpoints/step-{step:06d}: {problem}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(found: list[RunSummary]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in _COLUMNS:
        table.add_column(title, overflow="fold")
    now = time.time()
    for run in found:
        first, state, *others = _cells(run, now)
        table.add_row(Text(first), Text(state, style=_STYLES[state]), *(Text(cell) for cell in others))
    return table


def _cells(run: RunSummary, now: float) -> tuple[str, ...]:
    rows = f" ({run.num_rows:,})" if run.num_rows is not None else ""
    return (
        str(run.path),
        run.state,
        f"{run.step}/{'?' if run.total_steps is None else run.total_steps}",
        _number(run.loss),
        _number(run.best_eval_loss),
        Path(run.base).name,
        f"{Path(run.data).name}{rows}".strip(),
        age(now - run.written),
        size(run.size),
        f"{len(run.verified)} good{f', {len(run.damaged)} damaged' if run.damaged else ''}",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def age(seconds: float) -> str:
    """90 -> "1m"; 200000 -> "2d"."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def size(count: float) -> str:
    """1500000 -> "1.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
