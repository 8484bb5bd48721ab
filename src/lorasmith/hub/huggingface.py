"""Snapshots of the Hugging Face hub, with its errors told apart."""

from __future__ import annotations

import errno
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's or httpx2's, by release
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorasmith.errors import LorasmithError, SetupError, StorageError
from lorasmith.hub.download import FILES, NEVER, PICKLED_WEIGHTS

_LIST_TIMEOUT = 8.0  # seconds


def snapshot(repo: str, revision: str | None, output_dir: Path | None, local_files_only: bool | None) -> Path:
    """The directory of a repository's files. See `lorasmith.hub.download.download`."""
    offline = constants.HF_HUB_OFFLINE if local_files_only is None else local_files_only
    try:
        if offline:
            return _fetch(repo, revision, output_dir, FILES, offline=True)
        return _online(repo, revision, output_dir)
    except (HTTPError, OSError, HFValidationError) as error:
        raise _explained(error, repo, revision) from error


def _online(repo: str, revision: str | None, output_dir: Path | None) -> Path:
    try:
        names = HfApi().model_info(repo, revision=revision, timeout=_LIST_TIMEOUT).siblings or []
    except RevisionNotFoundError:
        raise
    except (HTTPError, OSError) as unreachable:
        try:
            return _fetch(repo, revision, output_dir, FILES, offline=True)
        except LocalEntryNotFoundError:
            raise unreachable from None
    wanted = [file.rfilename for file in names if not any(fnmatch(file.rfilename, no) for no in NEVER)]
    patterns = FILES if any(f.endswith(".safetensors") for f in wanted) else (*FILES, *PICKLED_WEIGHTS)
    return _fetch(repo, revision, output_dir, patterns, offline=False)


def _fetch(
    repo: str, revision: str | None, output_dir: Path | None, patterns: tuple[str, ...], *, offline: bool
) -> Path:
    directory = snapshot_download(
        repo,
        revision=revision,
        local_dir=output_dir,
        allow_patterns=list(patterns),
        ignore_patterns=list(NEVER),
        local_files_only=offline,
    )
    return Path(directory)


def _explained(error: Exception, repo: str, revision: str | None) -> LorasmithError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    where, why = f"{constants.ENDPOINT}/{repo}", _first_line(error)
    if isinstance(error, RevisionNotFoundError):
        return SetupError(f"{repo} has no revision {revision!r}", where=where, fix="check --revision")
    if isinstance(error, GatedRepoError) or status == 403:
        fix = "accept its terms on that page, then `hf auth login` (or set HF_TOKEN)"
        return SetupError(f"{repo} is open to accepted users only", where=where, why=why, fix=fix)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        fix = (
            "check the spelling; if it is private, `hf auth login`; if you meant a directory, check the path"
        )
        what = f"there is no {repo} on the hub for you, and no such directory here"
        return SetupError(what, where=where, why=why, fix=fix)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space; HF_HOME or --output-dir moves the files to another disk"
        return StorageError(f"no space left for {repo}", where=constants.HF_HUB_CACHE, why=why, fix=fix)
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        fix = "unset HF_HUB_OFFLINE and download it once, or name a local directory"
        what = f"{repo} is not whole in the cache, and this is offline"
        return SetupError(what, where=constants.HF_HUB_CACHE, fix=fix)
    if isinstance(error, HFValidationError):
        return SetupError(f"{repo!r} is no hub name", why=why, fix="a hub name is written org/name")
    return SetupError(
        f"{repo} could not be downloaded",
        where=constants.ENDPOINT,
        why=why,
        fix="check the network; or set HF_ENDPOINT to a mirror, use --hub modelscope, name a local directory",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
