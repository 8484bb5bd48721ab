"""What a family is: one torch-free file each. In: config.json. Out: Family. Never: torch, data, model."""

from __future__ import annotations

import difflib

from lorasmith.errors import FamilyError
from lorasmith.families import baichuan2, chatglm3, deepseek, generic, glm4, llama3, qwen3, transnormer
from lorasmith.families.base import ConfigJson, Family, stop_ids_of
from lorasmith.families.canary import check_canary, checked_tokenizer
from lorasmith.families.plugins import load_plugins

__all__ = [
    "Family",
    "all_families",
    "check_canary",
    "checked_tokenizer",
    "find_family",
    "refused_plugins",
    "stop_ids_of",
]

_NATIVE = (
    llama3.FAMILY,
    deepseek.FAMILY,
    baichuan2.FAMILY,
    chatglm3.FAMILY,
    transnormer.FAMILY,
    glm4.FAMILY,
    qwen3.FAMILY,
)
_BUILT_IN = frozenset(family.name for family in (*_NATIVE, generic.FAMILY))


def all_families() -> tuple[Family, ...]:
    """Every family by its own name: the native ones, those of plug-ins, then `generic`."""
    return (*_NATIVE, *load_plugins(_BUILT_IN).families, generic.FAMILY)


def refused_plugins() -> tuple[FamilyError, ...]:
    """Why each installed plug-in that is not among `all_families` cannot be used."""
    return tuple(load_plugins(_BUILT_IN).refused.values())


def find_family(config_json: ConfigJson, name: str = "auto") -> Family:
    """The family called `name`; with "auto" the one that fits config.json. `auto_map` is never followed.

    Raises: FamilyError if no family has this name, none fits, or two fit.
    """
    families = all_families()
    if name != "auto":
        return _named(name, families)
    fitting = [family for family in families if family is not generic.FAMILY and family.fits(config_json)]
    if len(fitting) > 1:
        names = " and ".join(family.name for family in fitting)
        raise FamilyError(
            f"config.json fits the families {names}",
            why=f"each of them takes a model with {_said(config_json)}",
            fix="say which with model.family",
        )
    if not fitting and not generic.FAMILY.fits(config_json):
        raise FamilyError(
            "config.json fits no family",
            why=f"it has {_said(config_json)}; `auto_map`, which names code to run, is never followed",
            fix=f"if it is a model of one of these families, say so with model.family: {_names(families)}"
            + _refused_hint(),
        )
    return fitting[0] if fitting else generic.FAMILY


def _named(name: str, families: tuple[Family, ...]) -> Family:
    for family in families:
        if family.name == name:
            return family
    refused = load_plugins(_BUILT_IN).refused
    if name in refused:
        raise refused[name]
    near = difflib.get_close_matches(name, [family.name for family in families], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FamilyError(f"there is no family {name!r}", fix=f"{hint}known: auto, {_names(families)}")


def _said(config: ConfigJson) -> str:
    keys = ("model_type", "architectures", "vocab_size", "padded_vocab_size")
    said = [f"{key} {config[key]!r}" for key in keys if config.get(key)]
    return ", ".join(said) or "neither model_type nor architectures"


def _refused_hint() -> str:
    refused = load_plugins(_BUILT_IN).refused
    told = f"; these plug-ins cannot be used, `lorasmith families` tells why: {', '.join(refused)}"
    return told if refused else ""


def _names(families: tuple[Family, ...]) -> str:
    return ", ".join(family.name for family in families)
