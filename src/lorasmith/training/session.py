"""Session: a run directory, a module with its adapter, and the loop, put together and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lorasmith.config import RunConfig
from lorasmith.errors import ConfigError, DataError
from lorasmith.hub.adapter_dir import ChatSettings
from lorasmith.model.adapter import attach_lora, initial_tensors
from lorasmith.model.dropout import DropoutClock
from lorasmith.model.dtype import DTYPE_NAMES
from lorasmith.model.load import module_dtype
from lorasmith.model.packed import PackedModule
from lorasmith.training.checkpoint import read_state, require_same_run
from lorasmith.training.loop import Fit, FitResult, StepSource
from lorasmith.training.progress import Reporter
from lorasmith.training.run_dir import open_run_dir, write_settings
from lorasmith.training.storage import Storage

_NOT_THE_RESULT = {
    *("output_dir", "max_tokens", "logging_steps", "save_steps", "save_total_limit", "golden_rows")
}
"""Keys of TrainConfig that a resume may change: they do not touch the adapter that comes out."""


class Session:
    """Everything a run needs before its first step; `run` may be called once.

    Raises: SetupError, CheckpointError for the directory; ConfigError for the adapter; DataError for
    token ids that the model does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        source: StepSource,
        config: RunConfig,
        *,
        family_targets: Sequence[str] | None,
        chat: ChatSettings | None,
        data_fingerprint: str,
        largest_id: int,
        held_out: bool,
        resume: bool,
        reporter: Reporter,
        storage: Storage,
    ) -> None:
        base = _untuned(module)
        _require_ids(base, largest_id)
        if not held_out:
            _refuse_idle_keys(config)
        self.run_dir = Path(config.train.output_dir)
        self.config = _resolved(config, base)
        self._source, self._reporter, self._storage = source, reporter, storage
        self._resume_from = open_run_dir(storage, self.run_dir, resume=resume, reporter=reporter)
        self._depends_on = {
            **_settings(self.config),
            "data": data_fingerprint,
            "base": _base_fingerprint(base),
        }
        if self._resume_from is not None:
            require_same_run(read_state(self._resume_from), self._depends_on, self._resume_from)
        self._clock = DropoutClock(config.train.seed)
        self.model = attach_lora(
            base,
            config.lora,
            family_targets=family_targets,
            base_name=chat.base if chat else base.name_or_path,
            clock=self._clock,
        )
        self._initial = initial_tensors(self.model, config.lora)
        write_settings(storage, self.run_dir, self.config, chat)

    def run(self, held_out_loss: Callable[[PackedModule], float] | None) -> FitResult:
        fit = Fit(
            self.model,
            self._source,
            self.config.train,
            run_dir=self.run_dir,
            clock=self._clock,
            initial=self._initial,
            depends_on=self._depends_on,
            held_out_loss=held_out_loss,
            reporter=self._reporter,
            storage=self._storage,
            resume_from=self._resume_from,
        )
        return fit.run()


def _untuned(module: nn.Module) -> PreTrainedModel:
    if not isinstance(module, PreTrainedModel):
        raise ConfigError(
            f"training starts from a base model, not from a {type(module).__name__}",
            why="this one carries an adapter already",
            fix="load the base model again; lora.init_from goes on from an adapter",
        )
    return module


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
    train = config.train.model_dump(exclude=_NOT_THE_RESULT)
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
