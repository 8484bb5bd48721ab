"""Family: what the house knows about one kind of model, as data and small functions. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lorasmith.errors import ConfigError
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.sentencepiece_model import SpecialPieces
from lorasmith.tokenization.tokenizer import Tokenizer

ConfigJson: TypeAlias = Mapping[str, Any]
FormatFactory: TypeAlias = Callable[[Tokenizer, Sequence[int]], ChatFormat]
"""A tokenizer and the stop ids that the model directory names beside the family's own -> a chat format."""


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    """As the authors spell it, for people."""
    fits: Callable[[ConfigJson], bool]
    """Whether a model directory's config.json is of this family."""
    chat_formats: Mapping[str, FormatFactory]
    """"official", and "tutorial" where there is a tutorial."""
    target_modules: tuple[str, ...] | None
    """Modules that `target_modules: auto` adapts; None: every linear layer but the head."""
    canary: str | None
    """File in families/canaries with strings and the ids that the real vocabulary gives them."""
    verified_against: str
    """What this family's ids and figures were checked with."""
    special_pieces: SpecialPieces | None = None
    """Given where the tokenizer is the original tokenizer.model: what in it exists by id only."""
    modeling: str | None = None
    """For plug-ins with torch classes of their own: the module that registers them when it is imported."""

    def chat_format(self, name: str, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = ()) -> ChatFormat:
        """`extra_stop_ids` are `stop_ids_of(generation_config)`, where the directory has one.

        Raises: ConfigError if the family has no format of this name; TokenizerError if the vocabulary lacks
        a token of the format; FamilyError if the model directory's own chat template is missing or unfit.
        """
        if name not in self.chat_formats:
            raise ConfigError(
                f"the family {self.name} has no chat format {name!r}",
                why=f"it has: {', '.join(self.chat_formats)}",
                fix=f"set model.chat_format to {next(iter(self.chat_formats))}",
            )
        return self.chat_formats[name](tokenizer, extra_stop_ids)


def stop_ids_of(generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The `eos_token_id` of a generation_config.json (or config.json): one id, several, or none."""
    eos = generation_config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
