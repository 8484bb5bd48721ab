"""metrics.jsonl: one JSON object per line, the only record of a run's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lorasmith.redaction import tree_without_secrets
from lorasmith.training.storage import Storage

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics.jsonl; a resume first drops the lines of steps that are taken again."""

    def __init__(self, storage: Storage, run_dir: Path, *, resumed_at: int | None) -> None:
        self._storage, self._path = storage, run_dir / METRICS_FILE
        if resumed_at is not None and self._path.exists():
            kept = [line for line in read_metrics(run_dir) if line["step"] <= resumed_at]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            storage.replace(self._path, text.encode())

    def write(self, **values: Any) -> None:
        """Non-finite numbers become null: JSON has no NaN."""
        tree = {key: None if _not_finite(value) else value for key, value in values.items()}
        self._storage.append(self._path, json.dumps(tree_without_secrets(tree), ensure_ascii=False))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    for text in (run_dir / METRICS_FILE).read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
