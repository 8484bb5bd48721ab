"""What a family is: one torch-free file each. In: config.json. Out: Family. Never: torch, data, model."""

from __future__ import annotations

import difflib

from lorasmith.errors import FamilyError
from lorasmith.families import deepseek, generic, llama3
from lorasmith.families.base import ConfigJson, Family, stop_ids_of
from lorasmith.families.canary import check_canary, checked_tokenizer

__all__ = [
    "Family",
    "all_families",
    "check_canary",
    "checked_tokenizer",
    "find_family",
    "stop_ids_of",
]

_NATIVE = (llama3.FAMILY, deepseek.FAMILY)
_COMING = {}
"""model_type: title and the architectures of models that elsewhere live by remote code only."""


def all_families() -> tuple[Family, ...]:
    """Every family by its own name: the native ones, then `generic`."""
    return (*_NATIVE, generic.FAMILY)


def find_family(config_json: ConfigJson, name: str = "auto") -> Family:
    """The family called `name`; with "auto" the one that fits config.json. `auto_map` is never followed.

    Raises: FamilyError if no family has this name, none fits, two fit, or its native port is not here yet.
    """
    _refuse_coming(config_json)
    if name != "auto":
        return _named(name)
    fitting = [family for family in _NATIVE if family.fits(config_json)]
    if len(fitting) > 1:
        names = " and ".join(family.name for family in fitting)
        raise FamilyError(f"config.json fits the families {names}", fix="say which with model.family")
    if not fitting and not generic.FAMILY.fits(config_json):
        raise FamilyError(
            "config.json does not say what kind of model this is",
            why="it has neither model_type nor architectures",
            fix=f"say it with model.family: one of {_names()}",
        )
    return fitting[0] if fitting else generic.FAMILY


def _named(name: str) -> Family:
    for family in all_families():
        if family.name == name:
            return family
    near = difflib.get_close_matches(name, [family.name for family in all_families()], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FamilyError(f"there is no family {name!r}", fix=f"{hint}known: auto, {_names()}")


def _refuse_coming(config: ConfigJson) -> None:
    said = {config.get("model_type"), *(config.get("architectures") or [])}
    for model_type, (title, *architectures) in _COMING.items():
        if said & {model_type, *architectures}:
            raise FamilyError(
                f"this release has no native port of {title} yet",
                why="elsewhere it runs by remote code only, which is never executed here; the port comes in "
                "the next release",
                fix=f"use a model of one of these families: {_names()}",
            )


def _names() -> str:
    return ", ".join(family.name for family in all_families())
