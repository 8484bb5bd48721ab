"""Model: a module with what is needed to talk to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
from transformers import PreTrainedModel

from lorasmith.config import ModelConfig
from lorasmith.families.base import Family
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Conversation, Example, Message


@dataclass
class Model:
    """What `load_model` returns and `train` tunes in place."""

    module: PreTrainedModel | peft.PeftModel
    """A plain transformers module, or peft's over it."""
    tokenizer: Tokenizer
    family: Family
    chat_format: ChatFormat
    directory: Path
    """Of the base model."""
    config: ModelConfig
    """How it was loaded. Adapters name `config.path`, a hub name or a directory, as their base."""
    system: str | None = None
    """The system prompt that a run was trained with; put before conversations that have none."""

    def encode(self, messages: Sequence[Message], *, for_generation: bool = False) -> Example:
        """Messages as token ids: for training with labels, or up to where the next answer begins.

        Raises: DataError if the chat format cannot write them or the tokenizer loses some of their text.
        """
        return self.chat_format.encode(
            Conversation(tuple(messages), "messages"), for_generation=for_generation
        )
