"""Installed versions against what we are tested with, and against known vulnerabilities."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from lorasmith.doctor.check import Check


@dataclass(frozen=True)
class Requirement:
    """A library as pyproject.toml asks for it, and the release that closed its last known hole for us."""

    name: str
    lowest: str
    below: str | None = None
    floor: str | None = None
    advisory: str = ""
    optional: bool = False


REQUIREMENTS = (
    # CVE-2026-24747: torch.load(weights_only=True) of a crafted .bin corrupts memory before 2.10.0.
    # CVE-2025-32434: it runs code before 2.6.0. Safetensors are not affected.
    Requirement("torch", "2.10", "2.14", "2.10.0", "CVE-2026-24747"),
    # CVE-2026-4372: config.json names code that from_pretrained runs, before 5.3.0; CVE-2026-5241 in 5.2.0.
    Requirement("transformers", "5.3", "6", "5.3.0", "CVE-2026-4372"),
    Requirement("peft", "0.21", "0.22"),
    Requirement("accelerate", "1.10"),
    Requirement("safetensors", "0.8"),
    Requirement("tokenizers", "0.22"),
    # CVE-2026-1260: a crafted tokenizer.model corrupts memory before 0.2.1.
    Requirement("sentencepiece", "0.2.1", "0.3", "0.2.1", "CVE-2026-1260"),
    Requirement("huggingface_hub", "1.3"),
    # CVE-2025-27516: a chat template breaks out of the sandbox before 3.1.6.
    Requirement("jinja2", "3.1.6", None, "3.1.6", "CVE-2025-27516"),
    Requirement("numpy", "1.26"),
    Requirement("packaging", "23"),
    Requirement("pydantic", "2.10", "3"),
    # CVE-2020-14343: full_load runs code before 5.4; here YAML is read by a safe loader.
    Requirement("pyyaml", "6.0", None, "5.4", "CVE-2020-14343"),
    # CVE-2023-47248: a crafted Parquet file runs code before 14.0.1.
    Requirement("pyarrow", "17", None, "14.0.1", "CVE-2023-47248", optional=True),
)
_LOWEST_PYTHON = "3.11"


def version_checks() -> Iterator[Check]:
    """One for Python and one for each library."""
    yield python_check(platform.python_version())
    yield from (version_check(wanted, _installed(wanted.name)) for wanted in REQUIREMENTS)


def python_check(found: str) -> Check:
    fits = Version(found) >= Version(_LOWEST_PYTHON)
    remedy = "" if fits else f"install Python {_LOWEST_PYTHON} or newer"
    return Check("python", "ok" if fits else "fail", found, remedy)


def version_check(wanted: Requirement, installed: str | None) -> Check:
    """Too old is a failure; too new, or in range but vulnerable, is a warning."""
    if installed is None and wanted.optional:
        return Check(wanted.name, "ok", "not installed, and only needed for Parquet files")
    install = f'pip install "{wanted.name}>={_safe(wanted)}{f",<{wanted.below}" if wanted.below else ""}"'
    if installed is None:
        return Check(wanted.name, "fail", "not installed", install)
    found, vulnerable = Version(installed), wanted.floor is not None and _older(installed, wanted.floor)
    told = f"{installed}; {wanted.advisory}, closed in {wanted.floor}" if vulnerable else installed
    if found < Version(wanted.lowest):
        return Check(wanted.name, "fail", f"{told}; needs {wanted.lowest} or newer", install)
    if vulnerable:
        return Check(wanted.name, "warn", told, install)
    if wanted.below and found >= Version(wanted.below):
        return Check(wanted.name, "warn", f"{told}; only tested below {wanted.below}", install)
    return Check(wanted.name, "ok", told)


def _safe(wanted: Requirement) -> str:
    return max(wanted.lowest, wanted.floor or "0", key=Version)


def _older(installed: str, floor: str) -> bool:
    return Version(installed) < Version(floor)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
