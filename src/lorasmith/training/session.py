"""Session: a run directory, a module with its adapter, and the loop, put together and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora, initial_tensors
from lorasmith.batching.columns import largest_id
from lorasmith.batching.fingerprint import fingerprint
from lorasmith.batching.loader import training_loader
from lorasmith.config import RunConfig
from lorasmith.errors import ConfigError, DataError
from lorasmith.files.adapter_dir import ChatSettings
from lorasmith.model.dtype import DTYPE_NAMES
from lorasmith.model.fp8 import require_fp8
from lorasmith.model.load import align_weights, module_dtype
from lorasmith.model.model import Model
from lorasmith.model.packed import PackedModule, takes_layout
from lorasmith.runs.manifest import checkpoint_dir, read_state
from lorasmith.runs.progress import Reporter
from lorasmith.runs.run_dir import is_finished, open_run_dir, write_settings
from lorasmith.runs.same_run import (
    NOT_THE_RESULT,
    Change,
    RowHashes,
    changes_since,
    require_same_run,
)
from lorasmith.storage import Storage
from lorasmith.training.checkpoint import require_room, restore
from lorasmith.training.loop import Fit, FitResult, fit_result, make_optimizer, total_steps
from lorasmith.types import Example

HeldOutLoss: TypeAlias = Callable[[PackedModule, int], float]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves in memory."""

    model: peft.PeftModel
    result: FitResult
    proved: tuple[int, int] | None = None
    """Of a proof: the steps (after, up to) that came out again bit by bit."""
    trained: bool = True
    """False where the run was finished before and is left as it was."""


class Session:
    """What a run is made of, checked. Nothing is written, and the module is as it was, until `run`.

    The best checkpoint, and so the adapter, depends on `held_out` too, which may be empty.
    Raises: ConfigError for the config, and for a module with an adapter; DataError for token ids that the
    model does not have, and where there is nothing to train on.
    """

    def __init__(
        self,
        model: Model | nn.Module,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        config: RunConfig,
        *,
        allow_changes: Sequence[str],
        reporter: Reporter,
        storage: Storage,
    ) -> None:
        tuned = model if isinstance(model, Model) else None
        self.base = _untuned(model.module if isinstance(model, Model) else model)
        _require_ids(self.base, max(largest_id(examples), largest_id(held_out)))
        if not held_out:
            _refuse_idle_keys(config)
        if config.train.fp8_base:
            require_fp8(self.base)
        self.run_dir, self.reporter = Path(config.train.output_dir), reporter
        self.config = _resolved(config, self.base)
        self._source = training_loader(examples, config.train, packed=takes_layout(self.base))
        self._storage, self._rows, self._allowed = storage, RowHashes.of(examples), allow_changes
        self._family_targets = tuned.family.target_modules if tuned else None
        self._chat = _chat_settings(tuned, config.data.system) if tuned else None
        self._depends_on = {
            **_settings(self.config),
            "data": self._rows.fingerprint,
            "held_out": fingerprint(held_out) if held_out else None,
            "base": _base_fingerprint(self.base),
        }
        self._clock = DropoutClock(config.train.seed)
        self.total_steps = total_steps(self._source, config.train)

    def run(self, held_out_loss: HeldOutLoss | None, *, resume: bool) -> Outcome:
        """Begin the run or go on with it, to its end; one that is finished is left as it is.

        Raises: SetupError, CheckpointError for the directory; ConfigError for the adapter; DivergedError;
        StorageError.
        """
        start = open_run_dir(self._storage, self.run_dir, resume=resume, reporter=self.reporter)
        changes = self.accepted_changes(start) if start else []
        if start and is_finished(self.run_dir, read_state(start), self.config.train, self.total_steps):
            return self._as_it_ended(start)
        if start:
            self.reporter.note(f"going on from {start.name}")
        model, initial = self.attach()
        require_room(self._storage, self.run_dir, model, initial)
        write_settings(self._storage, self.run_dir, self.config, self._chat, self._rows)
        fit = self.fit(model, initial, held_out_loss, self.run_dir, self._storage, start)
        if changes:
            told = {change.key: {"was": change.was, "now": change.now} for change in changes}
            fit.log.write(step=fit.state.step, event="changed", changes=told)
        return Outcome(model, fit.run())

    def accepted_changes(self, checkpoint: Path) -> list[Change]:
        """What differs from the run that wrote the checkpoint, each change noted.

        Raises: CheckpointError for one that was not allowed; ConfigError if the run now ends before it.
        """
        state = read_state(checkpoint)
        changes = changes_since(state.depends_on, self._depends_on)
        require_same_run(changes, self._allowed, checkpoint, self._rows)
        if state.step > self.total_steps:
            raise ConfigError(
                f"{checkpoint.name} lies beyond the end of the run, step {self.total_steps}",
                where=str(checkpoint),
                fix="raise train.max_steps or train.num_epochs, or choose a new train.output_dir",
            )
        for change in changes:
            self.reporter.note(f"changed, as allowed: {change.key}, was {change.was!r}, is {change.now!r}")
        return changes

    def attach(self) -> tuple[peft.PeftModel, dict[str, torch.Tensor] | None]:
        """The adapter over the base, and its initial tensors as `adapter_files` needs them. Call it once."""
        align_weights(self.base)
        model = attach_lora(
            self.base,
            self.config.lora,
            family_targets=self._family_targets,
            base_name=self._chat.base if self._chat else self.base.name_or_path,
            clock=self._clock,
        )
        return model, initial_tensors(model, self.config.lora)

    def fit(
        self,
        model: peft.PeftModel,
        initial: Mapping[str, torch.Tensor] | None,
        held_out_loss: HeldOutLoss | None,
        run_dir: Path,
        storage: Storage,
        start: Path | None,
    ) -> Fit:
        """The loop over what `attach` returned, from the checkpoint `start` on; it writes in `run_dir`."""
        return Fit(
            model,
            self._source,
            self.config.train,
            run_dir=run_dir,
            clock=self._clock,
            initial=initial,
            depends_on=self._depends_on,
            held_out_loss=held_out_loss,
            reporter=self.reporter,
            storage=storage,
            resume_from=start,
        )

    def _as_it_ended(self, newest: Path) -> Outcome:
        """The model with the run's result; no file is touched."""
        state, train = read_state(newest), self.config.train
        self.reporter.note(
            f"this run is finished, at step {state.step} of {self.total_steps}: nothing to do. "
            "For more: --set train.num_epochs=N --allow-change train.num_epochs"
        )
        model, _ = self.attach()
        best = state.best_step if train.final_adapter == "best" else None
        chosen = newest if best is None else checkpoint_dir(self.run_dir, best)
        restore(chosen, model, make_optimizer(model, train))
        early = state.step < self.total_steps
        result = fit_result(self.run_dir, state, self.total_steps, stopped_early=early)
        return Outcome(model.eval(), result, trained=False)


def _untuned(module: nn.Module) -> PreTrainedModel:
    if not isinstance(module, PreTrainedModel):
        raise ConfigError(
            f"training starts from a base model, not from a {type(module).__name__}",
            why="this one carries an adapter already",
            fix="load the base model again; lora.init_from goes on from an adapter",
        )
    return module


def _chat_settings(model: Model, system: str | None) -> ChatSettings:
    config, chat_format = model.config, model.chat_format.name
    return ChatSettings(config.path, model.family.name, chat_format, system, config.hub, config.revision)


def _refuse_idle_keys(config: RunConfig) -> None:
    """A key that would be read and do nothing is an error, like an unknown one."""
    train = config.train
    idle = [key for key in ("eval_steps", "early_stopping_patience") if getattr(train, key) is not None]
    idle += ["final_adapter"] if train.final_adapter == "best" else []
    if idle:
        raise ConfigError(
            f"{', '.join(f'train.{key}' for key in idle)} would do nothing: no rows are held out",
            fix="set data.eval to a share (0.02) or a file, or leave the key out",
        )


def _require_ids(base: PreTrainedModel, largest_id: int) -> None:
    rows = base.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise DataError(
            f"the data has token id {largest_id}, the model only {rows} rows of embeddings",
            why="the tokenizer belongs to another model",
            fix="use the tokenizer files that came with this model",
        )


def _resolved(config: RunConfig, base: PreTrainedModel) -> RunConfig:
    """The config with nothing left to guess, as config.yaml records it."""
    dtype = DTYPE_NAMES.get(module_dtype(base), config.model.dtype)
    model = config.model.model_copy(update={"dtype": dtype, "device": str(base.device)})
    return config.model_copy(update={"model": model})


def _settings(config: RunConfig) -> dict[str, Any]:
    """Every setting that the adapter depends on, by its dotted key."""
    lora = {f"lora.{key}": value for key, value in config.lora.model_dump().items()}
    train = config.train.model_dump(exclude=NOT_THE_RESULT)
    return {
        **lora,
        **{f"train.{key}": value for key, value in train.items()},
        "model.dtype": config.model.dtype,
    }


def _base_fingerprint(base: PreTrainedModel) -> str:
    """Names, shapes and the first values of every parameter: cheap at any size, and blind to the path."""
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        head = parameter.detach().flatten()[:16].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + head)
    return digest.hexdigest()
