"""Which checkpoints of a run there are, and which can be trusted: by a manifest, without loading a tensor.

MANIFEST.json: {"format": 2, "files": {name: {"size": bytes, "sha256": hex}}, "fingerprints": {of: hex}},
where "of" is config, data and base. Only safetensors and JSON: nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lorasmith.errors import CheckpointError
from lorasmith.json_file import LARGEST_JSON, as_record, parse_object, read_object, read_regular

FORMAT = 3
"""Of MANIFEST.json and state.json."""
MANIFEST, STATE, OPTIMIZER = "MANIFEST.json", "state.json", "optimizer.safetensors"
RECENT = 50
"""Losses that a new one is compared with."""
STEP_NAME = r"step-\d{6,}"
_STEP_DIR = re.compile(STEP_NAME)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Order, learning rate and dropout masks are functions of `step`, so this is all."""

    step: int = 0
    """Optimizer steps taken."""
    window_loss: float = 0.0
    """Sum of losses over the targets seen since the last line of metrics.jsonl."""
    window_targets: float = 0.0
    best_step: int | None = None
    best_eval_loss: float | None = None
    evals_since_best: int = 0
    evaluation_due: bool = False
    """The step was taken, its evaluation was not: a signal came before."""
    recent_losses: Sequence[float] = ()
    """Of the last steps taken, which a spike is measured against."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite, so that no update was made."""
    skipped_in_a_row: int = 0
    tokens_that_fit: int | None = None
    """The longest row, where a step ran out of memory; None: train.max_tokens holds."""
    tokens_asked: int | None = None
    """train.max_tokens at that time: another value is tried anew."""
    layers_recomputed: int = 0
    """At least so many, since a step ran out of memory."""
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter is a function of: each setting by its dotted key, and hashes of data and base."""

    def after(self, loss: float, num_targets: float) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            window_loss=self.window_loss + loss * num_targets,
            window_targets=self.window_targets + num_targets,
            recent_losses=(*self.recent_losses, loss)[-RECENT:],
            skipped_in_a_row=0,
        )

    def skipping(self) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            skipped_steps=self.skipped_steps + 1,
            skipped_in_a_row=self.skipped_in_a_row + 1,
        )


_STATE_KEYS = {field.name for field in fields(TrainState)}


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints, oldest step first: by number, never by the clock."""
    found = [p for p in (run_dir / "checkpoints").glob("step-*") if _STEP_DIR.fullmatch(p.name)]
    return sorted(found, key=step_of)


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and those passed over with the reason."""
    skipped: dict[Path, str] = {}
    for path in reversed(list_checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path, skipped
        skipped[path] = problem
    return None, skipped


def damage(path: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint; None if it holds the files of its manifest, each as it was written.

    `hashes` False: the sizes of the files must do, which costs nothing however large they are.
    """
    try:
        return _damage(path, hashes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"


def _damage(path: Path, hashes: bool) -> str | None:
    if path.is_symlink():
        return "it is a symbolic link"
    irregular = [p.name for p in path.iterdir() if p.is_symlink() or not p.is_file()]
    if irregular:
        return f"not regular files: {', '.join(sorted(irregular))}"
    data = read_regular(path / MANIFEST, LARGEST_JSON)
    manifest = parse_object(data)
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')!r}, this version of lorasmith reads {FORMAT}"
    there = {p.name for p in path.iterdir()} - {MANIFEST}
    if missing := manifest["files"].keys() - there:
        return f"missing files: {', '.join(sorted(missing))}"
    if surplus := there - manifest["files"].keys():
        return f"unknown files: {', '.join(sorted(surplus))}"
    for name, expected in manifest["files"].items():
        same_size = (path / name).stat().st_size == expected["size"]
        if not same_size or (hashes and _fingerprint(path / name) != expected):
            return f"{name} is not what was written"
    state = read_state(path)
    if data != json_bytes(manifest) or manifest["fingerprints"] != _fingerprints(state.depends_on):
        return f"{MANIFEST} is not what was written"
    return None if state.step == step_of(path) else f"it holds step {state.step}"


def read_state(path: Path) -> TrainState:
    """Raises: CheckpointError for a state that is damaged, or that another version wrote."""
    try:
        tree = read_object(path / STATE)
        is_ours = tree.pop("format", None) == FORMAT and tree.keys() <= _STATE_KEYS
        state = as_record(TrainState, tree) if is_ours else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{STATE} cannot be read", where=str(path / STATE), why=str(error)) from None
    if state is None:
        raise CheckpointError("this checkpoint was written by another version of lorasmith", where=str(path))
    return state


def manifest_bytes(files: Mapping[str, bytes], depends_on: Mapping[str, Any]) -> bytes:
    told = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    return json_bytes({"format": FORMAT, "files": told, "fingerprints": _fingerprints(depends_on)})


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


def _fingerprints(depends_on: Mapping[str, Any]) -> dict[str, str | None]:
    """Of the config (all settings that the adapter depends on, as one), of the data and of the base."""
    settings = {key: value for key, value in depends_on.items() if key not in ("data", "base")}
    config = hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return {"config": config, "data": depends_on.get("data"), "base": depends_on.get("base")}


def json_bytes(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
