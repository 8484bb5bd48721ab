"""The torch classes of a family from another package, told to transformers before the model is read."""

from __future__ import annotations

import importlib
from pathlib import Path

from transformers import PretrainedConfig

from lorasmith.errors import FamilyError
from lorasmith.families import Family
from lorasmith.model.load import read_model_config


def import_classes(family: Family) -> None:
    """Import the module that registers the family's own classes with AutoConfig and AutoModelForCausalLM.

    Raises: FamilyError naming the module if it cannot be imported.
    """
    if family.modeling is None:
        return
    try:
        importlib.import_module(family.modeling)
    except Exception as error:  # a plug-in's module may raise anything at all
        raise FamilyError(
            f"the model classes of the family {family.name} cannot be imported",
            where=family.modeling,
            why=f"{type(error).__name__}: {error}",
            fix="update the package that brings this family",
        ) from error


def family_config(directory: Path, family: Family) -> PretrainedConfig:
    """config.json as the config class of this family, whose own classes are then known to transformers."""
    import_classes(family)
    return read_model_config(directory)
