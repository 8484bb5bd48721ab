"""What run directories hold, read from their small files: no tensor is loaded, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorasmith.config import read_yaml
from lorasmith.errors import ConfigError, StorageError
from lorasmith.files.adapter_dir import ADAPTER_WEIGHTS
from lorasmith.runs.lock import holder_told, lock_holder
from lorasmith.runs.manifest import TrainState, damage, list_checkpoints, read_state, step_of
from lorasmith.runs.metrics import METRICS_FILE, read_metrics, unreadable_lines
from lorasmith.runs.run_dir import CONFIG_FILE, is_run_dir
from lorasmith.runs.same_run import RowHashes

_DEPTH = 3
"""How far below a directory runs are looked for."""


@dataclass(frozen=True)
class RunSummary:
    """One run directory."""

    path: Path
    state: Literal["running", "finished", "stopped", "damaged"]
    told: str
    """Who holds it, or what of it is damaged; else nothing."""
    step: int
    """The last one that the log or a checkpoint knows of."""
    total_steps: int | None
    """None before the first line of the log."""
    loss: float | None
    """The last logged one, in nats per target."""
    best_eval_loss: float | None
    base: str
    data: str
    num_rows: int | None
    written: float
    """When something was last written in it: seconds since the epoch."""
    size: int
    """Bytes."""
    verified: tuple[int, ...]
    """Steps of the checkpoints that hold what their manifests say."""
    damaged: Mapping[int, str]
    """Steps of the others, and why."""


def find_runs(directory: Path) -> Iterator[Path]:
    """`directory` if it is a run, else the runs at most three levels below it, by name."""
    yield from _runs_below(directory, _DEPTH)


def summarize(run_dir: Path, *, hashes: bool = False) -> RunSummary:
    """`hashes`: read every checkpoint whole, instead of comparing sizes."""
    checks = {path: damage(path, hashes=hashes) for path in list_checkpoints(run_dir)}
    good = [path for path, problem in checks.items() if problem is None]
    bad = {step_of(path): problem for path, problem in checks.items() if problem is not None}
    config, problem = _config(run_dir)
    lines = [line for line in read_metrics(run_dir) if "event" not in line]
    newest = read_state(good[-1]) if good else TrainState()
    step = max([newest.step, *(line["step"] for line in lines)])
    total = _last(lines, "total_steps")
    if problem is None and bad and not good:
        problem = "no checkpoint can be trusted"
    state, told = _state(run_dir, problem, newest, total, config)
    if not told and (lost := unreadable_lines(run_dir)):
        told = f"{METRICS_FILE}:{lost[0]} cannot be read" + f", nor {len(lost) - 1} more" * (len(lost) > 1)
    evaluated = [m["eval_loss"] for m in lines if m["step"] > 0 and m.get("eval_loss") is not None]
    rows = RowHashes.read(run_dir)
    size, written = _size_and_time(run_dir)
    return RunSummary(
        path=run_dir,
        state=state,
        told=told,
        step=step,
        total_steps=total,
        loss=_last(lines, "loss"),
        best_eval_loss=min(evaluated, default=None),
        base=_text(config, "model", "path"),
        data=_text(config, "data", "train"),
        num_rows=len(rows.hashes) if rows else None,
        written=written,
        size=size,
        verified=tuple(step_of(path) for path in good),
        damaged=bad,
    )


def _runs_below(directory: Path, depth: int) -> Iterator[Path]:
    if is_run_dir(directory):
        yield directory
    elif depth > 0:
        try:
            with os.scandir(directory) as entries:
                names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        except PermissionError:
            return
        for name in names:
            yield from _runs_below(directory / name, depth - 1)


def _state(
    run_dir: Path, problem: str | None, newest: TrainState, total: int | None, config: Mapping[str, Any]
) -> tuple[Literal["running", "finished", "stopped", "damaged"], str]:
    holder = _holder(run_dir)
    if holder is not None:
        return "running", holder
    if problem is not None:
        return "damaged", problem
    train = config.get("train")
    patience = train.get("early_stopping_patience") if isinstance(train, dict) else None
    early = isinstance(patience, int) and newest.evals_since_best >= patience
    ended = early or (newest.step > 0 and newest.step == total)
    return ("finished" if ended and (run_dir / ADAPTER_WEIGHTS).is_file() else "stopped"), ""


def _holder(run_dir: Path) -> str | None:
    try:
        content = lock_holder(run_dir)
    except StorageError:  # a lock file that we may not read
        return None
    return None if content is None else holder_told(content)[0]


def _config(run_dir: Path) -> tuple[Mapping[str, Any], str | None]:
    """config.yaml as it stands, also that of another version, and what is wrong with it."""
    if not (run_dir / CONFIG_FILE).exists():
        return {}, f"there is no {CONFIG_FILE}"
    try:
        return read_yaml(run_dir / CONFIG_FILE), None
    except ConfigError as error:
        return {}, f"{CONFIG_FILE}: {error.what}"


def _text(config: Mapping[str, Any], section: str, key: str) -> str:
    keys = config.get(section)
    value = keys.get(key) if isinstance(keys, dict) else None
    return value if isinstance(value, str) else ""


def _last(lines: list[dict[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def _size_and_time(run_dir: Path) -> tuple[int, float]:
    """A file that goes while we look counts nothing."""
    size, written = 0, 0.0
    for directory, _, names in os.walk(run_dir):
        for name in names:
            try:
                stat = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            size, written = size + stat.st_size, max(written, stat.st_mtime)
    return size, written
