"""check_family: one call that tells whether a family keeps the laws that every other one keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.families import Family, checked_tokenizer
from lorasmith.files.model_dir import read_json_if_there
from lorasmith.testing import chat_laws
from lorasmith.testing.law import require
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHAT_LAWS: tuple[Callable[[ChatFormat], None], ...] = (
    chat_laws.prompt_is_prefix,
    chat_laws.no_special_from_text,
    chat_laws.streams_whole_characters,
    chat_laws.answers_are_trained_whole,
    chat_laws.labels_are_ids,
    chat_laws.stop_ids_are_special,
)


def check_family(
    family: Family, directory: Path, *, module: Callable[[], PreTrainedModel] | None = None
) -> tuple[str, ...]:
    """Every law, on every chat format of `family`; returns the names of those that were checked.

    `directory` holds the family's tokenizer files, be they of a small vocabulary made for the test; a
    config.json in it must fit the family. `module` makes the same tiny random model at each call (float64,
    a vocabulary of 32 or more, dropout off): with it, the laws of numbers are checked too, and need torch.

    Raises: LawBroken with the case that breaks a law; TokenizerError if the tokenizer is not the family's.
    """
    config = read_json_if_there(directory / "config.json")
    require(not config or family.fits(config), "config.json fits its family", f"{family.name}: {config}")
    tokenizer = checked_tokenizer(family, load_tokenizer(directory, family.special_pieces))
    for name in family.chat_formats:
        for law in _CHAT_LAWS:
            law(family.chat_format(name, tokenizer))
    checked = [law.__name__ for law in _CHAT_LAWS]
    if module is None:
        return tuple(checked)
    from lorasmith.testing.model_laws import MODEL_LAWS  # late: it loads torch

    for model_law in MODEL_LAWS:
        model_law(module, family.target_modules)
    return (*checked, *(model_law.__name__ for model_law in MODEL_LAWS))
