"""Snapshots of the ModelScope hub; its client is an optional extra."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from lorasmith.errors import LorasmithError, SetupError, StorageError
from lorasmith.hub.download import FILES, NEVER, PICKLED_WEIGHTS


def snapshot(repo: str, revision: str | None, output_dir: Path | None, local_files_only: bool | None) -> Path:
    """The directory of a repository's files. See `lorasmith.hub.download.download`."""
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise SetupError(
            "the ModelScope client is not installed",
            fix='pip install "lorasmith[modelscope]", or use --hub huggingface',
        ) from None
    options: dict[str, Any] = {"ignore_patterns": list(NEVER), "local_files_only": _offline(local_files_only)}
    if revision is not None:
        options["revision"] = revision
    if output_dir is not None:
        options["local_dir"] = str(output_dir)
    try:
        directory = Path(snapshot_download(repo, allow_patterns=list(FILES), **options))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(repo, allow_patterns=[*FILES, *PICKLED_WEIGHTS], **options)
    except Exception as error:  # its releases raise from different trees
        raise _explained(error, repo) from error
    return directory


def _offline(local_files_only: bool | None) -> bool:
    if local_files_only is not None:
        return local_files_only
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _explained(error: Exception, repo: str) -> LorasmithError:
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space; MODELSCOPE_CACHE or --output-dir moves the files to another disk"
        return StorageError(f"no space left for {repo}", why=why, fix=fix)
    return SetupError(
        f"{repo} could not be downloaded from ModelScope",
        where=f"https://modelscope.cn/models/{repo}",
        why=why,
        fix="check the name, the network and `modelscope login`; or name a local directory",
    )
