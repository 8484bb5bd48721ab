"""fit(): the only loop of the house."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import peft
import torch

from lorasmith.config import TrainConfig
from lorasmith.model.adapter import adapter_files, trainable_parameters
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.dropout import DropoutClock
from lorasmith.model.packed import PackedModule, packed
from lorasmith.storage import Storage
from lorasmith.training.checkpoint import prune, restore, save_checkpoint
from lorasmith.training.manifest import TrainState, checkpoint_dir, read_state
from lorasmith.training.metrics import MetricsLog, read_metrics
from lorasmith.training.picture import draw_losses
from lorasmith.training.progress import Reporter, StepLine
from lorasmith.training.schedule import learning_rate
from lorasmith.training.step import StepResult, memory_told, train_step
from lorasmith.types import Batch


class StepSource(Protocol):
    """The data of step n, as a pure function of n."""

    @property
    def steps_per_epoch(self) -> int: ...

    def step(self, n: int) -> Sequence[Batch]: ...


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    step: int
    total_steps: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    best_step: int | None
    stopped_early: bool


class Fit:
    """A training run over one attached adapter. Complete when constructed; `run()` may be called once."""

    def __init__(
        self,
        model: peft.PeftModel,
        source: StepSource,
        config: TrainConfig,
        *,
        run_dir: Path,
        clock: DropoutClock,
        initial: Mapping[str, torch.Tensor] | None,
        depends_on: Mapping[str, Any],
        held_out_loss: Callable[[PackedModule], float] | None,
        reporter: Reporter,
        storage: Storage,
        resume_from: Path | None,
    ) -> None:
        self.model, self.source, self.config = model, source, config
        self.run_dir, self.clock, self.reporter, self.storage = run_dir, clock, reporter, storage
        self.held_out_loss, self.initial = held_out_loss, initial
        self.total_steps = total_steps(source, config)
        self.optimizer = make_optimizer(model, config)
        self.state = TrainState(depends_on=depends_on)
        if resume_from is not None:
            self.state = replace(read_state(resume_from), depends_on=depends_on)
            restore(resume_from, model, self.optimizer)
        self.log = MetricsLog(storage, run_dir, resumed_at=self.state.step if resume_from else None)
        self._window_tokens, self._window_start = 0, time.monotonic()

    def run(self) -> FitResult:
        """Train to the end. Raises: DivergedError, StorageError; the last checkpoint stands then."""
        stopped_early = self.train_until(self.total_steps)
        self._publish()
        self.model.eval()
        return fit_result(self.run_dir, self.state, self.total_steps, stopped_early=stopped_early)

    def train_until(self, step: int) -> bool:
        """Train as `run` does, but no further than `step`. True if early stopping ended it."""
        self.model.train()
        self.reporter.start(self.state.step, self.total_steps)
        recompute = self.config.activation_checkpointing
        try:
            with packed(self.model, self.clock) as rows, activation_checkpointing(self.model, recompute):
                return self._train(rows, step)
        finally:
            self.reporter.finish()

    def _train(self, rows: PackedModule, last: int) -> bool:
        if self.state.step == 0:
            self._evaluate(rows)
        patience = self.config.early_stopping_patience
        while self.state.step < last:
            if patience and self.state.evals_since_best >= patience:  # also where a resume stands there
                self.reporter.note(f"stopped early: no better held-out loss in {patience} evaluations")
                self._save()
                return True
            result = self._step(rows)
            done = self.state.step == self.total_steps
            if done or self._due(self.config.logging_steps):
                self._log(result)
            if done or self._due(self.config.eval_steps):
                self._evaluate(rows)
            if done or self._due(self.config.save_steps) or self.state.best_step == self.state.step:
                self._save()
        return False

    def _step(self, rows: PackedModule) -> StepResult:
        self.clock.step = self.state.step
        with memory_told():
            result = train_step(
                rows,
                self.optimizer,
                self.source.step(self.state.step),
                learning_rate=learning_rate(self.state.step, self.total_steps, self.config),
                max_grad_norm=self.config.max_grad_norm,
            )
        self.state = self.state.after(result.loss, result.num_targets)
        self._window_tokens += result.num_tokens
        self.reporter.advance(self.state.step)
        return result

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _log(self, result: StepResult) -> None:
        seconds = max(time.monotonic() - self._window_start, 1e-9)
        steps = self.state.step % self.config.logging_steps or self.config.logging_steps
        line = StepLine(
            step=self.state.step,
            total_steps=self.total_steps,
            loss=self.state.window_loss / self.state.window_targets,
            learning_rate=learning_rate(self.state.step - 1, self.total_steps, self.config),
            grad_norm=result.grad_norm,
            tokens_per_second=self._window_tokens / seconds,
            eta_seconds=(self.total_steps - self.state.step) * seconds / steps,
        )
        self.log.write(
            step=line.step,
            total_steps=line.total_steps,
            epoch=round(self.state.step / self.source.steps_per_epoch, 4),
            loss=line.loss,
            grad_norm=line.grad_norm,
            learning_rate=line.learning_rate,
            num_targets=int(self.state.window_targets),
            tokens_per_second=round(line.tokens_per_second, 1),
        )
        self.reporter.line(line)
        self.state = replace(self.state, window_loss=0.0, window_targets=0.0)
        self._window_tokens, self._window_start = 0, time.monotonic()

    def _evaluate(self, rows: PackedModule) -> None:
        if self.held_out_loss is None:
            return
        started = time.monotonic()
        self.model.eval()
        loss = self.held_out_loss(rows)
        self.model.train()
        self.log.write(step=self.state.step, eval_loss=loss)
        best = self.state.best_eval_loss
        if self.state.step > 0 and (best is None or loss < best):
            self.state = replace(
                self.state, best_step=self.state.step, best_eval_loss=loss, evals_since_best=0
            )
        elif self.state.step > 0:
            self.state = replace(self.state, evals_since_best=self.state.evals_since_best + 1)
        self.reporter.note(f"step {self.state.step}: held-out loss {loss:.4f}")
        self._window_start += time.monotonic() - started

    def _save(self) -> None:
        started = time.monotonic()
        save_checkpoint(self.storage, self.run_dir, self.state, self.model, self.optimizer, self.initial)
        prune(self.storage, self.run_dir, self.config.save_total_limit, self.state.best_step)
        self._window_start += time.monotonic() - started

    def _publish(self) -> None:
        """The run directory becomes an adapter directory."""
        if self.config.final_adapter == "best" and self.state.best_step is not None:
            restore(checkpoint_dir(self.run_dir, self.state.best_step), self.model, self.optimizer)
        for name, data in adapter_files(self.model, self.initial).items():
            self.storage.replace(self.run_dir / name, data)
        draw_losses(self.storage, self.run_dir, read_metrics(self.run_dir))


def fit_result(run_dir: Path, state: TrainState, total_steps: int, *, stopped_early: bool) -> FitResult:
    losses = [m["eval_loss"] for m in read_metrics(run_dir) if m.get("eval_loss") is not None]
    return FitResult(
        step=state.step,
        total_steps=total_steps,
        eval_loss_before=losses[0] if losses else None,
        eval_loss_after=losses[-1] if losses else None,
        best_step=state.best_step,
        stopped_early=stopped_early,
    )


def total_steps(source: StepSource, config: TrainConfig) -> int:
    steps = config.num_epochs * source.steps_per_epoch
    return min(steps, config.max_steps) if config.max_steps else steps


def make_optimizer(model: peft.PeftModel, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(trainable_parameters(model).values()),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
