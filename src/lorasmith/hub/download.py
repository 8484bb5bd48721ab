"""A path or a hub name -> a directory on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorasmith.errors import ConfigError, SetupError

FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")
"""What a model or an adapter is made of. Code (*.py) is never fetched: it would never run."""

PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
"""Fetched only from repositories that have no safetensors; read with weights_only."""

NEVER = ("*/*", "consolidated*")
"""Second copies of the weights, in the authors' own layout."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILE_ENDINGS = (
    ".json",
    ".jsonl",
    ".yaml",
    ".yml",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".zip",
    ".gz",
)


def resolve(
    path_or_repo: str,
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """The directory of a model: an existing one as it stands, else a hub name's, downloaded where needed.

    `local_files_only` None: as HF_HUB_OFFLINE says. Raises: SetupError if there is neither; StorageError if
    the disk is full.
    """
    path = Path(os.path.expanduser(path_or_repo))
    if os.path.isdir(path):  # unlike Path's own, it takes a name that no system can have for absent
        return path
    _require_hub_name(path_or_repo, path)
    return download(path_or_repo, hub=hub, revision=revision, local_files_only=local_files_only)


def download(
    repo: str,
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    output_dir: Path | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """The files of `org/name`, in the hub's own cache or in `output_dir`; what is there is not fetched again.

    Raises: SetupError telling an absent name from one that needs a login and from a network that is down.
    """
    _require_hub_name(repo, Path(repo))
    if hub == "huggingface":
        from lorasmith.hub.huggingface import snapshot
    elif hub == "modelscope":
        from lorasmith.hub.modelscope import snapshot
    else:
        raise ConfigError(f"there is no hub {hub!r}", fix="use huggingface or modelscope")
    return snapshot(repo, revision, output_dir, local_files_only)


def _require_hub_name(text: str, path: Path) -> None:
    fix = "check the path; a hub name is written org/name"
    if os.path.isfile(path):
        fix = f"name its directory: {path.parent}"
        raise SetupError(f"{text} is a file, not the directory of a model", fix=fix)
    if text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text:
        raise SetupError(f"there is no directory {text}", fix=fix)
    if text.endswith(_FILE_ENDINGS):
        raise SetupError(
            f"there is no file {text}", fix="name the directory of a model, or a hub name org/name"
        )
    if not _HUB_NAME.fullmatch(text):
        raise SetupError(f"{text!r} is neither a directory here nor a hub name", fix=fix)
