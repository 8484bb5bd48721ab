"""The composition root: what a user's program calls, each a short chain of calls into the rooms below.

Rooms that load torch are imported by the functions that need them, so that a data check or a config error
costs a fraction of a second.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lorasmith.config import (
    DataConfig,
    Dtype,
    GenerateConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    validate,
)
from lorasmith.errors import ConfigError, DataError
from lorasmith.types import Completion, Example, Message

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

    from lorasmith.data.dataset import Dataset
    from lorasmith.evaluation.verification import Verification
    from lorasmith.families.base import Family
    from lorasmith.model.model import Model
    from lorasmith.runs.progress import Reporter
    from lorasmith.storage import Storage
    from lorasmith.text.template import ChatFormat
    from lorasmith.training.session import Outcome, Session

Resume: TypeAlias = bool | Literal["prove"]


@dataclass(frozen=True)
class Run:
    """A finished training run; `output_dir` is a PEFT adapter directory."""

    output_dir: Path
    step: int
    eval_loss_before: float | None
    """Held-out loss in nats per target token, before the first step; None without held-out rows."""
    eval_loss_after: float | None
    best_step: int | None
    stopped_early: bool
    proved: tuple[int, int] | None = None
    """Of `resume="prove"`: the steps (after, up to) that came out again bit by bit."""


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats per target token, over the whole set."""
    perplexity: float
    num_targets: int


def download(repo: str, *, hub: str = "huggingface", revision: str | None = None) -> Path:
    """A hub name -> the directory of its files; a directory is returned as it is."""
    from lorasmith.hub.download import resolve

    return resolve(repo, hub=hub, revision=revision)


def load_chat_format(
    path_or_repo: str, *, family: str = "auto", chat_format: str = "official", hub: str = "huggingface"
) -> ChatFormat:
    """The chat format of a model directory, from its config.json and tokenizer files alone."""
    from lorasmith.families.opening import open_chat

    return open_chat(download(path_or_repo, hub=hub), family, chat_format)[1]


def load_module(
    path_or_repo: str,
    *,
    family: str = "auto",
    dtype: Dtype = "auto",
    device: str = "auto",
    adapter: str | None = None,
) -> PreTrainedModel | peft.PeftModel:
    """The bare transformers module of a model directory, which needs no tokenizer; with `adapter`, peft's
    over it.

    Raises: FamilyError, SetupError if the directory is not a whole model of a family that runs here.
    """
    from lorasmith.adapters.lora import load_adapter
    from lorasmith.families.opening import open_family
    from lorasmith.model.dtype import resolve_device, resolve_dtype
    from lorasmith.model.load import hidden_size, load_base
    from lorasmith.model.plugin_classes import family_config

    directory = download(path_or_repo)
    config = family_config(directory, open_family(directory, family))
    on = resolve_device(device)
    module = load_base(directory, config, resolve_dtype(dtype, on, hidden_size(config)), on)
    return load_adapter(module, Path(adapter)) if adapter else module


def load_model(
    path_or_repo: str,
    *,
    family: str = "auto",
    chat_format: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    adapter: str | None = None,
    checkpoint: int | None = None,
    hub: str = "huggingface",
    revision: str | None = None,
) -> Model:
    """A model to train or to talk to: a base model, or a run (or any PEFT adapter directory) over its base.

    A run brings its family, chat format and system prompt with it; `checkpoint` picks one of its steps.
    `chat_format` None means the run's own, else "official".
    """
    from lorasmith.families.opening import open_chat
    from lorasmith.files.adapter_dir import settings_asked

    chat = settings_asked(path_or_repo, adapter, hub, revision)
    asked = {"dtype": dtype, "device": device, "hub": chat.hub, "revision": chat.revision}
    asked["path"], asked["chat_format"] = _absolute(chat.base), chat_format or chat.chat_format
    asked["family"] = chat.family if family == "auto" else family
    config = validate(ModelConfig, asked, where="load_model")
    directory = download(config.path, hub=config.hub, revision=config.revision)
    found, written = open_chat(directory, config.family, config.chat_format)

    from lorasmith.runs.run_dir import adapter_asked

    adapter = adapter_asked(Path(path_or_repo), adapter, checkpoint)
    return opened_model(config, directory, found, written, adapter=adapter, system=chat.system)


def opened_model(
    config: ModelConfig,
    directory: Path,
    family: Family,
    chat_format: ChatFormat,
    *,
    adapter: str | None = None,
    system: str | None = None,
) -> Model:
    """The model of a directory whose family and chat format are known: only weights are to be read."""
    from lorasmith.model.model import Model  # torch, only now that the directory is known to be a model's

    asked: dict[str, Any] = {"dtype": config.dtype, "device": config.device, "adapter": adapter}
    module = load_module(str(directory), family=family.name, **asked)
    settled = config.model_copy(update={"path": _absolute(config.path), "family": family.name})
    return Model(module, chat_format.tokenizer, family, chat_format, directory, settled, system)


def load_dataset(path: str | Path, model: Model | ChatFormat, **options: Any) -> Dataset:
    """Rows of a file (or a hub data set) as checked, encoded examples.

    `options` are keys of DataConfig: system, eval, format, columns, max_length, over_length, on_bad_row, ...
    Raises: DataError naming every bad row by file and line; ConfigError for an unknown option.
    """
    from lorasmith.data.dataset import load
    from lorasmith.families.opening import context_length
    from lorasmith.model.model import Model

    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"load_dataset reads a file, not a {type(path).__name__}",
            fix="write the rows to a .jsonl file and name it; ls.train takes a list of Examples as it is",
        )
    config = validate(DataConfig, {"train": str(path), **options}, where="load_dataset")
    written = model.chat_format if isinstance(model, Model) else model
    limit = context_length(model.directory) if isinstance(model, Model) else None
    return load(config, written, model_max_length=limit)


def train(
    model: Model | PreTrainedModel,
    data: Dataset | Sequence[Example],
    *,
    output_dir: str | Path,
    lora: LoraConfig | None = None,
    train: TrainConfig | None = None,
    resume: Resume = False,
    allow_changes: Sequence[str] = (),
    reporter: Reporter | None = None,
    storage: Storage | None = None,
) -> Run:
    """Fine-tune a LoRA adapter; `model` carries it afterwards, and `output_dir` holds it.

    `resume` True goes on from the newest good checkpoint; "prove" takes the steps before it again, compares
    them bit by bit and changes nothing. `allow_changes` names what may differ from the run that is resumed:
    keys of its config ("train.learning_rate"), "data", "base".

    Raises: SetupError if a run lies in `output_dir` and `resume` is False, or another one is writing there;
    CheckpointError if there is nothing to resume, or it belongs to another run; DataError for examples that
    this model cannot take; MemoryLimitError; DivergedError; NotReproducedError; StorageError; Interrupted (a
    KeyboardInterrupt too) by SIGINT, SIGTERM, SIGHUP or SIGUSR1, with a checkpoint to resume from.
    """
    from lorasmith.evaluation.golden import base_fingerprint, is_golden
    from lorasmith.evaluation.loss import loss_while_training
    from lorasmith.evaluation.recording import keep_golden
    from lorasmith.model.model import Model
    from lorasmith.runs.lock import run_lock
    from lorasmith.runs.progress import default_reporter
    from lorasmith.runs.run_dir import resume_told
    from lorasmith.storage import Storage
    from lorasmith.training.prove import prove
    from lorasmith.training.session import Session

    require_resumable(Path(output_dir), resume, allow_changes)
    config = _run_config(model, data, lora, train, output_dir)
    examples, held_out = _examples_of(data)
    reporter, storage = reporter or default_reporter(), storage or Storage()
    session = Session(
        model, examples, held_out, config, allow_changes=allow_changes, reporter=reporter, storage=storage
    )
    base = base_fingerprint(session.base)
    held_out_loss = loss_while_training(held_out, config.train, session.base)
    if resume == "prove":
        return _ended(session, model, prove(session, held_out_loss))
    with resume_told(Path(output_dir)), run_lock(storage, Path(output_dir), reporter):
        outcome = session.run(held_out_loss, resume=resume)
        run = _ended(session, model, outcome)
        if not outcome.trained and is_golden(session.run_dir):
            return run
        if not outcome.trained:
            reporter.note("golden.json is missing or damaged: it is written anew, for `lorasmith verify`")
        tuned = model if isinstance(model, Model) else outcome.model
        keep_golden(tuned, data, config.train.golden_rows, base, storage, session.run_dir)
    return run


def chat(model: Model, messages: Sequence[Message], *, generate: GenerateConfig | None = None) -> Completion:
    """The answer to a conversation. Raises: DataError if it does not fit into the model's context."""
    from lorasmith.infer.chat import chat as answer

    return answer(model, messages, generate or GenerateConfig())


def generate(
    model: Model,
    conversations: Sequence[Sequence[Message]],
    *,
    generate: GenerateConfig | None = None,
    batch_size: int = 8,
) -> list[Completion]:
    """The answers to many conversations, in their order, generated in batches."""
    from lorasmith.infer.generate import generate as answers

    return answers(model, conversations, generate or GenerateConfig(), batch_size=batch_size)


def evaluate(model: Model, data: Dataset | Sequence[Example], *, max_tokens: int = 4096) -> Evaluation:
    """Loss and perplexity over rows: a data set's held-out rows where it has some, else all of them."""
    from lorasmith.batching.loader import evaluation_loader
    from lorasmith.evaluation.loss import held_out_loss
    from lorasmith.model.packed import takes_layout

    examples, held_out = _examples_of(data)
    loader = evaluation_loader(held_out or examples, max_tokens, packed=takes_layout(model.module))
    model.module.eval()
    loss = held_out_loss(model.module, loader.epoch())
    return Evaluation(loss, math.exp(loss), loader.num_targets)


def verify(
    path: str | Path,
    *,
    base: str | None = None,
    dtype: Dtype | None = None,
    device: str = "auto",
) -> Verification:
    """Whether a run, an adapter made of it or a merged directory still says what golden.json recorded.

    `base` replaces the base model that an adapter names; `dtype` None is the recorded one.
    Raises: SetupError without a readable golden.json, or if the directory cannot be loaded at all.
    """
    from lorasmith.evaluation.verification import verify as verify_directory

    return verify_directory(Path(path), base=base, dtype=dtype, device=device)


def _ended(session: Session, model: Model | PreTrainedModel, outcome: Outcome) -> Run:
    """The model carries what was trained."""
    from lorasmith.model.model import Model

    if isinstance(model, Model):
        model.module, model.system = outcome.model, session.config.data.system
    how = asdict(outcome.result)
    del how["total_steps"]
    return Run(output_dir=session.run_dir, proved=outcome.proved, **how)


def require_resumable(run_dir: Path, resume: Resume, allow_changes: Sequence[str]) -> None:
    """A first look, before anything is read or made. Raises: CheckpointError without a run to resume;
    ConfigError for changes that cannot be allowed."""
    from lorasmith.runs.run_dir import require_run
    from lorasmith.runs.same_run import require_known

    require_known(allow_changes)
    if allow_changes and not resume:
        raise ConfigError("a change is allowed to nothing: this is no resume", fix="add --resume")
    if resume:
        require_run(run_dir)


def _run_config(
    model: Model | PreTrainedModel,
    data: Dataset | Sequence[Example],
    lora: LoraConfig | None,
    train: TrainConfig | None,
    output_dir: str | Path,
) -> RunConfig:
    """The recipe that the arguments of `train` amount to."""
    from lorasmith.data.dataset import Dataset
    from lorasmith.model.model import Model

    return RunConfig(
        model=model.config if isinstance(model, Model) else ModelConfig(),
        data=_lasting(data.config) if isinstance(data, Dataset) else DataConfig(),
        lora=lora or LoraConfig(),
        train=(train or TrainConfig()).model_copy(update={"output_dir": str(output_dir)}),
    )


def _examples_of(data: Dataset | Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and held-out examples. Raises: DataError if there is nothing to train on."""
    from lorasmith.batching.columns import target_counts_of
    from lorasmith.data.dataset import Dataset

    examples, held_out = (data.examples, data.held_out) if isinstance(data, Dataset) else (data, ())
    silent = [examples[row].origin for row in np.flatnonzero(target_counts_of(examples) == 0).tolist()]
    if silent:
        raise DataError(
            f"{len(silent)} examples have nothing to learn: every label is masked",
            where=", ".join(silent[:10]),
            fix="leave them out, or label their answers",
        )
    return examples, held_out


def _lasting(data: DataConfig) -> DataConfig:
    """The same rows from any working directory."""
    own = {"eval": _absolute(data.eval)} if isinstance(data.eval, str) else {}
    return data.model_copy(update={"train": _absolute(data.train), **own})


def _absolute(path_or_repo: str) -> str:
    """A run outlives the working directory it was started from; hub names stay as they are."""
    return str(Path(path_or_repo).resolve()) if os.path.exists(path_or_repo) else path_or_repo
