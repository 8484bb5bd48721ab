"""Families of other packages, each announced by one entry point of the group `lorasmith.families`.

A plug-in that cannot be used is told and left out: what is built in works whatever else is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
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
    except (Exception, SystemExit) as error:  # a plug-in's module may raise anything at all
        raise _refusal(entry_point, f"{type(error).__name__}: {error}") from error
    if not isinstance(family, Family):
        raise _refusal(entry_point, f"it is of type {type(family).__name__}, not lorasmith.families.Family")
    if flaw := _flaw(family, taken):
        raise _refusal(entry_point, flaw)
    return family


def _flaw(family: Family, taken: Collection[str]) -> str | None:
    said = vars(family)  # of any type: the annotations are a promise that a plug-in may break
    name, formats = said["name"], said["chat_formats"]
    if not isinstance(name, str) or not name:
        return f"its name is {name!r}, not text"
    if name in taken or name == "auto":
        return f"the name {name!r} is taken"
    if not callable(said["fits"]):
        return "its `fits` is no function"
    if not isinstance(formats, Mapping) or "official" not in formats:
        return "it has no chat format 'official', which is the default one"
    return None


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
