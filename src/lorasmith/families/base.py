"""Family: what the house knows about one kind of model, as data and small functions. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lorasmith.chat.template import ChatFormat
from lorasmith.chat.tokenizer import Tokenizer

ConfigJson: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    """As the authors spell it, for people."""
    fits: Callable[[ConfigJson], bool]
    """Whether a model directory's config.json is of this family."""
    chat_formats: Mapping[str, Callable[[Tokenizer], ChatFormat]]
    """"official", and "tutorial" where there is a tutorial."""
    target_modules: tuple[str, ...] | None
    """Modules that `target_modules: auto` adapts; None: every linear layer but the head."""
    canary: str | None
    """File in families/canaries with strings and the ids that the real vocabulary gives them."""
    verified_against: str
    """What this family's ids and figures were checked with."""
