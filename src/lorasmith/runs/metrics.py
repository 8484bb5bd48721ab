"""metrics.jsonl: one JSON object per line, the only record of a run's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lorasmith.redaction import tree_without_secrets
from lorasmith.storage import Storage

METRICS_FILE = "metrics.jsonl"
_NUMBERS = ("loss", "eval_loss", "grad_norm", "learning_rate", "num_targets")


class MetricsLog:
    """Appends to a run's metrics.jsonl; first drops what is no line, and the lines of steps taken again.

    `resumed_at`: the checkpoint's step; None for a run that starts at step 0.
    """

    def __init__(self, storage: Storage, run_dir: Path, *, resumed_at: int | None) -> None:
        self._storage, self._path = storage, run_dir / METRICS_FILE
        if self._path.exists():
            last = -1 if resumed_at is None else resumed_at
            kept = [line for line in read_metrics(run_dir) if line["step"] <= last]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            storage.replace(self._path, text.encode())

    def write(self, **values: Any) -> None:
        """Non-finite numbers become null: JSON has no NaN."""
        tree = {key: None if _not_finite(value) else value for key, value in values.items()}
        self._storage.append(self._path, json.dumps(tree_without_secrets(tree), ensure_ascii=False))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without those that a crash or a bad disk left unreadable."""
    return [line for line in map(_parsed, _whole_lines(run_dir)) if line is not None]


def unreadable_lines(run_dir: Path) -> list[int]:
    """The numbers, from 1, of the lines that `read_metrics` leaves out."""
    lines = enumerate(_whole_lines(run_dir), start=1)
    return [number for number, line in lines if line and _parsed(line) is None]


def _whole_lines(run_dir: Path) -> list[str]:
    """Without a last one that is being written, or was when the process ended."""
    path = run_dir / METRICS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text.split("\n")[:-1]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or not _is_count(tree.get("step")):
        return None
    numbers_hold = all(isinstance(tree.get(key), float | None) or _is_count(tree[key]) for key in _NUMBERS)
    return (
        tree if numbers_hold and (tree.get("total_steps") is None or _is_count(tree["total_steps"])) else None
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
