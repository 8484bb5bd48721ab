"""fit(): the only loop of the house."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import adapter_files, trainable_parameters
from lorasmith.batching.source import StepSource
from lorasmith.config import TrainConfig
from lorasmith.errors import DivergedError, Interrupted
from lorasmith.memory.fitting import Fitting, Room
from lorasmith.memory.limits import trim_heap
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.fp8 import fp8_base
from lorasmith.model.packed import PackedModule, packed
from lorasmith.runs.manifest import TrainState, checkpoint_dir, read_state
from lorasmith.runs.metrics import MetricsLog, read_metrics
from lorasmith.runs.picture import draw_losses
from lorasmith.runs.progress import Reporter, StepLine
from lorasmith.storage import Storage
from lorasmith.training.checkpoint import prune, restore, save_checkpoint
from lorasmith.training.guard import (
    MOVED_BY,
    culprits,
    is_spike,
    losses_alone,
    not_finite,
    require_finite_adapter,
    require_moved,
    require_moving_loss,
)
from lorasmith.training.schedule import learning_rate
from lorasmith.training.signals import StopRequest, stop_requests
from lorasmith.training.step import StepResult, step_gradients, update

_ROWS_NAMED = 5


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    step: int
    total_steps: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    best_step: int | None
    stopped_early: bool


@dataclass(frozen=True)
class Running:
    """What there is between the first step and the last."""

    rows: PackedModule
    fitting: Fitting
    stop: StopRequest


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
        held_out_loss: Callable[[PackedModule, int], float] | None,
        reporter: Reporter,
        storage: Storage,
        resume_from: Path | None,
    ) -> None:
        self.model, self.source, self.config = model, source, config
        self.run_dir, self.clock, self.reporter, self.storage = run_dir, clock, reporter, storage
        self.held_out_loss, self.initial = held_out_loss, initial
        self.total_steps = total_steps(source, config)
        self.optimizer = make_optimizer(model, config)
        self.parameters = list(trainable_parameters(model).values())
        self.state = TrainState(depends_on=depends_on)
        if resume_from is not None:
            self.state = replace(read_state(resume_from), depends_on=depends_on)
            restore(resume_from, model, self.optimizer)
        self.log = MetricsLog(storage, run_dir, resumed_at=self.state.step if resume_from else None)
        self._window_tokens, self._window_start = 0, time.monotonic()

    def run(self) -> FitResult:
        """Train to the end; the last checkpoint stands whatever is raised.

        Raises: DivergedError, MemoryLimitError, StorageError; Interrupted by a signal, with a checkpoint of
        the step that it ended.
        """
        stopped_early = self.train_until(self.total_steps)
        self._publish()
        self.model.eval()
        return fit_result(self.run_dir, self.state, self.total_steps, stopped_early=stopped_early)

    def train_until(self, step: int) -> bool:
        """Train as `run` does, but no further than `step`. True if early stopping ended it."""
        self.model.train()
        self.reporter.start(self.state.step, self.total_steps)
        try:
            with (
                stop_requests() as stop,
                packed(self.model, self.clock) as rows,
                activation_checkpointing(self.model) as layers,
                fp8_base(self.model, enabled=self.config.fp8_base),
            ):
                room, told = self._remembered_room(), self._remember_room
                fitting = Fitting(self.source, self.config, rows, layers, room=room, told=told)
                return self._train(Running(rows, fitting, stop), step)
        finally:
            self.reporter.finish()

    def _train(self, on: Running, last: int) -> bool:
        self._begin_fitting(on)
        if self.state.step == 0:
            self._evaluate(on)
        elif (self.state.evaluation_due or self._out_of_patience()) and self._end_step(on):
            return True
        while self.state.step < last:
            result = self._step(on)
            done = self.state.step == self.total_steps
            if done or self._due(self.config.logging_steps):
                self._log(result)
            self.state = replace(self.state, evaluation_due=done or self._due(self.config.eval_steps))
            if on.stop and not done:
                self._leave(on)
            if self._end_step(on):
                return True
        return False

    def _end_step(self, on: Running) -> bool:
        """Evaluate and save where that is due. True if early stopping ends the run here."""
        if self.state.evaluation_due:
            self._evaluate(on)
        done = self.state.step == self.total_steps
        if done or self._due(self.config.save_steps) or self.state.best_step == self.state.step:
            self._save()
        if done or not self._out_of_patience():
            return False
        patience = self.config.early_stopping_patience
        self.reporter.note(f"stopped early: no better held-out loss in {patience} evaluations")
        self._save()
        return True

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.evals_since_best >= patience

    def _leave(self, on: Running) -> NoReturn:
        """Raises: Interrupted; a checkpoint of this moment stands."""
        self._save()
        raise on.stop.error(
            after=f"after step {self.state.step} of {self.total_steps}, which is saved",
            go_on=f"go on by: lorasmith train --resume --output-dir {self.run_dir}",
        )

    def _step(self, on: Running) -> StepResult:
        """Take the step, or skip it; count it in either case."""
        self.clock.step = self.state.step
        result = on.fitting.step(self.state.step, partial(self._gradients, on.rows), self.optimizer.zero_grad)
        problem = not_finite(result.loss, result.grad_norm)
        if problem is None:
            self._update(on, result)
        else:
            self._skip(on, result, problem)
        self._window_tokens += result.num_tokens
        self.reporter.advance(self.state.step)
        return result

    def _gradients(self, rows: PackedModule, max_tokens: int) -> StepResult:
        batches = self.source.step(self.state.step, max_tokens)
        return step_gradients(rows, self.parameters, batches, max_grad_norm=self.config.max_grad_norm)

    def _update(self, on: Running, result: StepResult) -> None:
        if is_spike(self.state.recent_losses, result.loss):
            highest = losses_alone(on.rows, self.source.alone(self.state.step))[:_ROWS_NAMED]
            self._event("spike", loss=result.loss, rows=[row.origin for row in highest])
            told = ", ".join(map(str, highest))
            self.reporter.note(f"step {self.state.step + 1}: the loss leaps to {result.loss:.4f}: {told}")
        rate = learning_rate(self.state.step, self.total_steps, self.config)
        on.fitting.once("the optimizer's update", lambda: update(self.optimizer, rate))
        self.state = self.state.after(result.loss, result.num_targets)
        if self.config.learning_rate > 0:
            taken = self.state.step - self.state.skipped_steps
            if taken == MOVED_BY or (self.state.step == self.total_steps and result.loss > 0):
                require_moved(self.model, self.state.step)
            require_moving_loss(self.state.recent_losses, self.state.step)

    def _skip(self, on: Running, result: StepResult, problem: str) -> None:
        """Raises: DivergedError where it is the last of too many in a row."""
        self.optimizer.zero_grad(set_to_none=True)
        rows = culprits(on.rows, self.source.alone(self.state.step), self.parameters)
        self._event("skipped", reason=problem, loss=result.loss, grad_norm=result.grad_norm, rows=rows)
        self.state = self.state.skipping()
        told = ", ".join(rows[:_ROWS_NAMED]) + (
            f" and {len(rows) - _ROWS_NAMED} more" * (len(rows) > _ROWS_NAMED)
        )
        self.reporter.note(f"step {self.state.step} is skipped: {problem} ({told})")
        if self.state.skipped_in_a_row < self.config.max_skipped_steps:
            return
        raise DivergedError(
            f"step {self.state.step}: {problem}",
            where=told,
            why=f"{self.state.skipped_in_a_row} steps in a row were not finite, and were not taken: the run "
            "diverged, or these rows break the model",
            fix="look at the rows; start again with a lower train.learning_rate, or with dtype bf16 or fp32 "
            "instead of fp16. The last checkpoint stands: lora.init_from goes on from its adapter",
        )

    def _event(self, event: str, **values: Any) -> None:
        """A line of metrics.jsonl about the step under way."""
        self.log.write(step=self.state.step + 1, event=event, **values)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _log(self, result: StepResult) -> None:
        seconds = max(time.monotonic() - self._window_start, 1e-9)
        steps = self.state.step % self.config.logging_steps or self.config.logging_steps
        line = StepLine(
            step=self.state.step,
            total_steps=self.total_steps,
            loss=self.state.window_loss / self.state.window_targets
            if self.state.window_targets
            else math.nan,
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

    def _evaluate(self, on: Running) -> None:
        if self.held_out_loss is not None:
            started = time.monotonic()
            self._score(self._held_out_loss(on))
            self._window_start += time.monotonic() - started
        self.state = replace(self.state, evaluation_due=False)

    def _held_out_loss(self, on: Running) -> float:
        """A signal is not waited with: the evaluation is given up, and done again after the resume."""
        held_out_loss = self.held_out_loss
        assert held_out_loss is not None
        self.model.eval()
        try:
            with on.stop.at_once():
                return on.fitting.evaluation(partial(held_out_loss, on.rows))
        except Interrupted:
            self._leave(on)
        finally:
            self.model.train()

    def _score(self, loss: float) -> None:
        self.log.write(step=self.state.step, eval_loss=loss)
        best = self.state.best_eval_loss
        if self.state.step > 0 and (best is None or loss < best):
            self.state = replace(
                self.state, best_step=self.state.step, best_eval_loss=loss, evals_since_best=0
            )
        elif self.state.step > 0:
            self.state = replace(self.state, evals_since_best=self.state.evals_since_best + 1)
        self.reporter.note(f"step {self.state.step}: held-out loss {loss:.4f}")

    def _begin_fitting(self, on: Running) -> None:
        on.fitting.begin(self.model, self.state.step, self.total_steps)
        layers = on.fitting.room.recomputed_layers
        if layers and self.config.activation_checkpointing == "auto":
            self.reporter.note(f"memory is short: the first {layers} layers recompute their activations")

    def _remembered_room(self) -> Room | None:
        fits, asked = self.state.tokens_that_fit, self.state.tokens_asked
        return Room(fits, self.state.layers_recomputed) if fits and asked == self.config.max_tokens else None

    def _remember_room(self, room: Room) -> None:
        """Memory ran out: the step is done again in these parts, as are those that follow."""
        fits, layers = room.max_tokens, room.recomputed_layers
        self._event("out_of_memory", max_tokens=fits, recomputed_layers=layers)
        self.reporter.note(
            f"step {self.state.step + 1}: out of memory; again, and from here on, with {fits:,} tokens at "
            f"once and {layers} layers recomputing: the result stays the same"
        )
        asked = self.config.max_tokens
        self.state = replace(self.state, tokens_that_fit=fits, tokens_asked=asked, layers_recomputed=layers)

    def _save(self) -> None:
        started = time.monotonic()
        require_finite_adapter(self.parameters, self.state.step)
        save_checkpoint(self.storage, self.run_dir, self.state, self.model, self.optimizer, self.initial)
        prune(self.storage, self.run_dir, self.config.save_total_limit, self.state.best_step)
        trim_heap()
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


def _named(rows: Sequence[str]) -> str:
    more = len(rows) - _ROWS_NAMED
    return ", ".join(rows[:_ROWS_NAMED]) + (f" and {more} more" if more > 0 else "")


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
