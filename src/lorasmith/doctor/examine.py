"""Every check of the house, in the order in which a person would look: one call for the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorasmith.doctor import adapter_files, chat, disk, machine, model_files, numerics, versions
from lorasmith.doctor.check import Check, Examine, guarded
from lorasmith.errors import LorasmithError, SetupError
from lorasmith.files.adapter_dir import ChatSettings, is_adapter_dir, read_chat_settings, settings_asked
from lorasmith.hub.download import resolve


@dataclass(frozen=True)
class Request:
    """What to look at besides the machine."""

    model: str | None = None
    """A model directory, a hub name that is in the cache, or a run."""
    adapter: str | None = None
    output_dir: str = "runs"
    deep: bool = False
    """Read every byte of the weights for their sha256."""


def examine(request: Request) -> Iterator[Check]:
    """Each check as soon as it is known. Nothing is downloaded, and nothing raises."""
    directory, family, chat_format, checks = _opened(request)
    yield from checks
    plan = [*_machine(Path(request.output_dir))]
    if directory is not None:
        plan += _model(directory, family, chat_format, request.deep)
    if request.model is None or directory is not None:
        plan.append(("numerics", partial(numerics.numerics_checks, directory, family)))
    adapter = request.adapter or _run_of(request.model)
    if adapter is not None:
        plan.append(("adapter", partial(adapter_files.adapter_checks, Path(adapter), directory, family)))
    for name, look in plan:
        yield from guarded(name, look)


def _machine(output_dir: Path) -> list[tuple[str, Examine]]:
    return [
        ("versions", versions.version_checks),
        ("cpu", machine.cpu_check),
        ("threads", machine.own_threads_check),
        ("gpu", machine.gpu_checks),
        ("products", machine.product_check),
        ("disk space", partial(disk.space_check, output_dir)),
        ("disk writes", partial(disk.write_check, output_dir)),
        ("hub cache", disk.cache_check),
    ]


def _model(directory: Path, family: str, chat_format: str, deep: bool) -> list[tuple[str, Examine]]:
    spoken = (directory, family, chat_format)
    hashes: list[tuple[str, Examine]] = [("sha256", partial(model_files.hash_checks, directory))]
    return [
        ("family", partial(model_files.family_check, directory, family)),
        ("remote code", partial(model_files.code_check, directory)),
        ("weights", partial(model_files.weights_check, directory)),
        *(hashes if deep else []),
        ("tokenizer", partial(chat.tokenizer_check, *spoken)),
        ("chat format", partial(chat.chat_check, *spoken)),
        ("embeddings", partial(chat.embeddings_check, *spoken)),
    ]


def _opened(request: Request) -> tuple[Path | None, str, str, list[Check]]:
    """The model's directory, family and chat format; None, and a check that says why, if it is not here."""
    if request.model is None:
        return None, "auto", "official", []
    try:
        chat_settings = _settings(request)
        directory = resolve(
            chat_settings.base,
            hub=chat_settings.hub,
            revision=chat_settings.revision,
            local_files_only=True,
        )
    except LorasmithError as error:
        fix = error.fix or f"lorasmith download {request.model}"
        return None, "auto", "official", [Check("model", "fail", error.what, fix)]
    return directory, chat_settings.family, chat_settings.chat_format, [Check("model", "ok", str(directory))]


def _settings(request: Request) -> ChatSettings:
    assert request.model is not None
    if is_adapter_dir(Path(request.model)):
        return read_chat_settings(Path(request.model))
    if request.adapter is not None and not is_adapter_dir(Path(request.adapter)):
        raise SetupError(f"{request.adapter} is no adapter directory", fix="name a run, or a PEFT adapter")
    return settings_asked(request.model, request.adapter, "huggingface", None)


def _run_of(model: str | None) -> str | None:
    return model if model is not None and is_adapter_dir(Path(model)) else None
