"""Families of other packages, each announced by one entry point of the group `lorasmith.families`.

A plug-in that cannot be used is told and left out: what is built in works whatever else is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points

from lorasmith.errors import FamilyError
from lorasmith.families.base import ConfigJson, Family

GROUP = "lorasmith.families"


@dataclass(frozen=True)
class Plugins:
    families: tuple[Family, ...]
    refused: dict[str, FamilyError]
    """By the name of the entry point: why it cannot be used."""


def load_plugins(taken: Collection[str]) -> Plugins:
    """The installed plug-ins, in the order of their names; `taken` are the names of the built-in families."""
    families: dict[str, Family] = {}
    refused: dict[str, FamilyError] = {}
    for entry_point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            family = _load(entry_point, {*taken, *families})
        except FamilyError as error:
            refused[entry_point.name] = error
        else:
            families[family.name] = replace(family, fits=_guarded(family))
    return Plugins(tuple(families.values()), refused)


def _load(entry_point: EntryPoint, taken: Collection[str]) -> Family:
    try:
        family = entry_point.load()
    except Exception as error:  # a plug-in's module may raise anything at all
        raise _refusal(entry_point, f"{type(error).__name__}: {error}") from error
    if not isinstance(family, Family):
        raise _refusal(entry_point, f"it is a {type(family).__name__}, not a lorasmith.families.Family")
    if family.name in taken or family.name == "auto":
        raise _refusal(entry_point, f"the name {family.name!r} is taken by another family")
    if "official" not in family.chat_formats:
        raise _refusal(entry_point, "it has no chat format 'official', which is the default one")
    return family


def _guarded(family: Family) -> Callable[[ConfigJson], bool]:
    """`fits` is asked about every model: one that raises must not stand in the way of other families."""

    def fits(config: ConfigJson) -> bool:
        try:
            return bool(family.fits(config))
        except Exception as error:  # a plug-in's function may raise anything at all
            message = f"the plug-in family {family.name} was left out: its fits() raised {error!r}"
            warnings.warn(message, stacklevel=2)
            return False

    return fits


def _refusal(entry_point: EntryPoint, why: str) -> FamilyError:
    package = entry_point.dist.name if entry_point.dist else "an unknown package"
    return FamilyError(
        f"the plug-in family {entry_point.name!r} cannot be used",
        where=f"{entry_point.value}, of {package}",
        why=why,
        fix=f"update or uninstall {package}; the other families are not touched by it",
    )
