"""`--resume prove`: the last steps before a checkpoint, trained again and compared bit by bit.

The steps from the checkpoint before it (or from step 0) are taken on the same data, in a temporary directory.
Held against the run are the lines of metrics.jsonl and every tensor of adapter and optimizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorasmith.errors import CheckpointError, Interrupted, NotReproducedError
from lorasmith.files.adapter_dir import ADAPTER_WEIGHTS
from lorasmith.runs.manifest import (
    OPTIMIZER,
    damage,
    list_checkpoints,
    newest_checkpoint,
    step_of,
)
from lorasmith.runs.metrics import read_metrics
from lorasmith.storage import Storage
from lorasmith.training.checkpoint import save_checkpoint
from lorasmith.training.loop import Fit, fit_result
from lorasmith.training.session import HeldOutLoss, Outcome, Session

_LOSSES = ("loss", "eval_loss")
_EXACT = ("learning_rate", "grad_norm", *_LOSSES)
"""What of a line of metrics.jsonl does not depend on the speed of the machine."""


@dataclass(frozen=True)
class _Span:
    """The steps to take again."""

    start: Path | None
    """The checkpoint before; None: from step 0."""
    end: Path
    lines: Sequence[dict[str, Any]]
    """Of the run's metrics.jsonl, those that these steps wrote."""

    @property
    def first(self) -> int:
        return step_of(self.start) if self.start else 0

    @property
    def last(self) -> int:
        return step_of(self.end)


def prove(session: Session, held_out_loss: HeldOutLoss | None) -> Outcome:
    """Take the run's last steps again and compare. Nothing changes in its directory, which is not locked.

    Raises: CheckpointError if there is no checkpoint, or the data, the base or the config is another now;
    NotReproducedError naming the first line of the log that came out otherwise.
    """
    span = _last_span(session)
    session.accepted_changes(span.end)
    model, initial = session.attach()
    with tempfile.TemporaryDirectory(prefix="lorasmith-prove-") as scratch:
        fit = session.fit(model, initial, held_out_loss, Path(scratch), Storage(), span.start)
        _train_again(fit, session.run_dir, span.last)
        again = save_checkpoint(Storage(), Path(scratch), fit.state, model, fit.optimizer, initial)
        lines = _lines(Path(scratch), span.start, span.last)
        differing_line = _first_difference(span.lines, lines)
        tensors, differing = _compared(span.end, again)
    if differing_line or differing:
        raise _not_reproduced(session, span, differing_line, differing, len(tensors))
    session.reporter.note(
        f"steps {span.first + 1} to {span.last} reproduced bit by bit: "
        f"{len(span.lines)} lines of the log, {len(tensors)} tensors of adapter and optimizer"
    )
    result = fit_result(session.run_dir, fit.state, session.total_steps, stopped_early=False)
    return Outcome(model.eval(), result, (span.first, span.last))


def _train_again(fit: Fit, run_dir: Path, last: int) -> None:
    """Raises: Interrupted, as a run does, in words of a proof."""
    try:
        fit.train_until(last)
    except Interrupted as stop:
        said = "the proof was given up; nothing of the run has changed"
        raise type(stop)(said, where=str(run_dir), fix="start it again") from stop


def _last_span(session: Session) -> _Span:
    end, skipped = newest_checkpoint(session.run_dir)
    for path, problem in skipped.items():
        session.reporter.note(f"passing over {path.name}: {problem}")
    if end is None:
        raise CheckpointError(
            "there is no checkpoint to prove",
            where=str(session.run_dir),
            why="; ".join(f"{path.name}: {problem}" for path, problem in skipped.items()),
            fix="train until the first one is written (train.save_steps)",
        )
    earlier = [p for p in list_checkpoints(session.run_dir) if step_of(p) < step_of(end) and not damage(p)]
    start = earlier[-1] if earlier else None
    session.reporter.note(f"proving {end.name} from {start.name if start else 'step 0'}")
    return _Span(start, end, _lines(session.run_dir, start, step_of(end)))


def _lines(run_dir: Path, start: Path | None, last: int) -> list[dict[str, Any]]:
    """What the steps after `start`, up to `last`, left in the log; from step 0 also the first evaluation."""
    first = -1 if start is None else step_of(start)
    lines = [line for line in read_metrics(run_dir) if "event" not in line]
    return [line for line in lines if first < line["step"] <= last and any(key in line for key in _LOSSES)]


def _first_difference(then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str | None:
    """In words. A line that stands only on one side is no difference: `logging_steps` may have changed."""
    ours = {(line["step"], "loss" in line): line for line in now}
    for line in then:
        other = ours.get((line["step"], "loss" in line), line)
        same_window = line.get("num_targets") == other.get("num_targets")
        for key in _EXACT:
            if line.get(key) != other.get(key) and (same_window or key != "loss"):
                return f"at step {line['step']} {key} was {line.get(key)!r}, came out as {other.get(key)!r}"
    return None


def _compared(then: Path, now: Path) -> tuple[list[str], list[str]]:
    """The names of all tensors of two checkpoints, and of those that differ in a bit."""
    names, differing = [], []
    for file in (ADAPTER_WEIGHTS, OPTIMIZER):
        before, after = load_file(then / file), load_file(now / file)
        names += sorted(before.keys() | after.keys())
        differing += [
            name
            for name in sorted(before.keys() | after.keys())
            if name not in before or name not in after or not _same_bits(before[name], after[name])
        ]
    return names, differing


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN equals itself here, and 0 is not -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _not_reproduced(
    session: Session, span: _Span, line: str | None, differing: Sequence[str], tensors: int
) -> NotReproducedError:
    found = [line] if line else ["every line of the log came out again"]
    if differing:
        found.append(f"{len(differing)} of {tensors} tensors of {span.end.name} differ, first {differing[0]}")
    else:
        found.append(f"all {tensors} tensors of {span.end.name} came out again")
    return NotReproducedError(
        f"steps {span.first + 1} to {span.last} did not come out as they did then",
        where=str(session.run_dir),
        why="; ".join(found),
        fix=f"another number of threads (now {torch.get_num_threads()}), machine, version of torch or "
        "train.max_tokens may legally differ in the last digits: prove with those it was trained with; "
        "else the data, the base, the log or a checkpoint was changed",
    )
