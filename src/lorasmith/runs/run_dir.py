"""A run directory: new, one to go on with, or one to read. It is itself a PEFT adapter directory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from filecmp import cmp
from pathlib import Path

from lorasmith.config import RunConfig, TrainConfig, to_yaml
from lorasmith.errors import CheckpointError, ConfigError, SetupError, StorageError
from lorasmith.files.adapter_dir import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHAT_FORMAT_FILE,
    GOLDEN_FILE,
    PICKLED_ADAPTER_WEIGHTS,
    ChatSettings,
    is_adapter_dir,
)
from lorasmith.files.links import refuse_links
from lorasmith.runs.lock import LOCK_FILE
from lorasmith.runs.manifest import (
    STEP_NAME,
    TrainState,
    checkpoint_dir,
    damage,
    list_checkpoints,
    newest_checkpoint,
)
from lorasmith.runs.metrics import METRICS_FILE
from lorasmith.runs.picture import LOSS_PICTURE
from lorasmith.runs.progress import Reporter
from lorasmith.runs.same_run import ROWS_FILE, RowHashes
from lorasmith.storage import AGAIN, Storage

CONFIG_FILE = "config.yaml"
REJECTS_FILE = "rejects.jsonl"
_OUR_FILES = (
    CONFIG_FILE,
    CHAT_FORMAT_FILE,
    ROWS_FILE,
    METRICS_FILE,
    LOSS_PICTURE,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GOLDEN_FILE,
    REJECTS_FILE,
)


def open_run_dir(storage: Storage, run_dir: Path, *, resume: bool, reporter: Reporter) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0. The caller holds `run_lock`.

    Raises: SetupError if a run lies there and `resume` was not asked for, or a symbolic link in the place of
    what is written; CheckpointError if it was, and there is none, or none of its checkpoints verifies: a run
    never starts from scratch in silence.
    """
    refuse_links(run_dir, (*_OUR_FILES, "checkpoints"))
    if resume:
        require_run(run_dir)
        _remove_leftovers(storage, run_dir)
        return _checkpoint_to_resume(storage, run_dir, reporter)
    if is_run_dir(run_dir):
        raise SetupError(
            "there is a run in this directory already",
            where=str(run_dir),
            fix="go on with it by --resume, or choose another train.output_dir",
        )
    _remove_leftovers(storage, run_dir)
    return None


def is_run_dir(path: Path) -> bool:
    """A run was begun there, and wrote something that a new one would have to overwrite."""
    return any((path / name).exists() for name in (CONFIG_FILE, METRICS_FILE)) or bool(list_checkpoints(path))


@contextmanager
def resume_told(run_dir: Path) -> Iterator[None]:
    """A disk that refuses a run: what to do names --resume, where there is something to go on with."""
    try:
        yield
    except StorageError as error:
        if error.fix.endswith(AGAIN) and is_run_dir(run_dir):
            error.fix += ", with --resume: the checkpoints stand"
        raise


def require_run(run_dir: Path) -> None:
    """For a first look of a resume. Raises: CheckpointError saying what is there instead of a run."""
    if is_run_dir(run_dir):
        return
    names = sorted(p.name for p in run_dir.iterdir() if p.name != LOCK_FILE) if run_dir.is_dir() else []
    found = ", ".join([*names[:6], *(["..."] if names[6:] else [])])
    raise CheckpointError(
        "there is no run to resume",
        where=str(run_dir),
        why=f"it holds {found}"
        if found
        else "it is empty"
        if run_dir.is_dir()
        else "there is no such directory",
        fix="check train.output_dir (`lorasmith runs DIR` lists runs), or leave --resume out to begin one",
    )


def is_finished(run_dir: Path, state: TrainState, train: TrainConfig, total_steps: int) -> bool:
    """Whether the run ended at `state`, and its result is that of the checkpoint it must be of."""
    if state.step != total_steps and not stopped_early(state, train):
        return False
    best = state.best_step if train.final_adapter == "best" else None
    source = checkpoint_dir(run_dir, state.step if best is None else best)
    return (run_dir / LOSS_PICTURE).exists() and all(
        (run_dir / name).is_file() and (source / name).is_file() and cmp(run_dir / name, source / name, False)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    )


def stopped_early(state: TrainState, train: TrainConfig) -> bool:
    patience = train.early_stopping_patience
    return patience is not None and state.evals_since_best >= patience


def _remove_leftovers(storage: Storage, run_dir: Path) -> None:
    """What a killed run was writing or deleting; nothing that it did not name itself."""
    storage.remove_leftovers(run_dir, "|".join(map(re.escape, _OUR_FILES)))
    storage.remove_leftovers(run_dir / "checkpoints", STEP_NAME)


def _checkpoint_to_resume(storage: Storage, run_dir: Path, reporter: Reporter) -> Path | None:
    checkpoint, skipped = newest_checkpoint(run_dir)
    for path, problem in skipped.items():
        reporter.note(f"passing over {path.name}: {problem}")
    if checkpoint is None and skipped:
        raise CheckpointError(
            "no checkpoint of this run can be trusted",
            where=str(run_dir),
            why="; ".join(f"{path.name}: {problem}" for path, problem in skipped.items()),
            fix="start again in a new train.output_dir",
        )
    if checkpoint is None:
        reporter.note(f"this run has no checkpoint yet: starting at step 0 in {run_dir}")
    return checkpoint


def write_settings(
    storage: Storage, run_dir: Path, config: RunConfig, chat: ChatSettings | None, rows: RowHashes
) -> None:
    """config.yaml, resolved, rows.json and chat_format.json; a bare module has no chat format."""
    storage.replace(run_dir / ROWS_FILE, rows.to_json())
    storage.replace(run_dir / CONFIG_FILE, to_yaml(config).encode())
    if chat is not None:
        text = json.dumps(asdict(chat), indent=2, ensure_ascii=False) + "\n"
        storage.replace(run_dir / CHAT_FORMAT_FILE, text.encode())


def adapter_asked(path: Path, adapter: str | None, checkpoint: int | None) -> str | None:
    """The adapter to load when a person names `path`, and perhaps an adapter or a checkpoint; None: none.

    Raises: ConfigError for an adapter beside a run, and for a checkpoint of what is no run.
    """
    if is_adapter_dir(path):
        if adapter is not None:
            fix = "name its base model in its place, or leave the adapter out"
            raise ConfigError("a run brings its own adapter", where=str(path), fix=fix)
        return str(adapter_of(path, checkpoint))
    if checkpoint is not None:
        fix = "name the run directory, or leave the checkpoint out"
        raise ConfigError("only a run has checkpoints", where=str(path), fix=fix)
    return adapter


def adapter_of(path: Path, checkpoint: int | None) -> Path:
    """The directory with the adapter's files: a checkpoint of the run, else its result.

    Raises: CheckpointError if that checkpoint is absent or damaged, or the run has no adapter yet.
    """
    if checkpoint is not None:
        return _chosen_checkpoint(path, checkpoint)
    is_there = any((path / name).exists() for name in (ADAPTER_WEIGHTS, PICKLED_ADAPTER_WEIGHTS))
    if is_there or not is_run_dir(path):  # an adapter from elsewhere is no run, whatever it lacks
        return path
    newest, _ = newest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            "this run has no adapter yet",
            where=str(path),
            fix="go on with it: lorasmith train --resume with its config.yaml",
        )
    return newest


def _chosen_checkpoint(path: Path, step: int) -> Path:
    chosen = checkpoint_dir(path, step)
    if not chosen.exists():
        there = [found.name for found in list_checkpoints(path)]
        raise CheckpointError(
            f"there is no checkpoint of step {step}",
            where=str(path),
            fix=f"there are: {', '.join(there)}" if there else "this run kept none",
        )
    problem = damage(chosen)
    if problem is not None:
        raise CheckpointError(f"{chosen.name} is damaged", where=str(chosen), why=problem)
    return chosen
