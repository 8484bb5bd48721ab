"""Lorasmith gives an open chat model a new voice, by LoRA fine-tuning.

    import lorasmith as ls

    model = ls.load_model("deepseek-ai/deepseek-llm-7b-chat")
    data = ls.load_dataset("huanhuan.json", model)
    run = ls.train(model, data, output_dir="runs/huanhuan")
    print(ls.chat(model, [ls.Message("user", "你是谁？")]).content)

Importing has no effect and loads no torch: the names below are fetched when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.api import (
        Evaluation,
        Run,
        chat,
        download,
        evaluate,
        generate,
        load_dataset,
        load_model,
        load_module,
        train,
        verify,
    )
    from lorasmith.config import (
        DataConfig,
        GenerateConfig,
        LoraConfig,
        ModelConfig,
        RunConfig,
        TrainConfig,
    )
    from lorasmith.errors import LorasmithError
    from lorasmith.handover import convert_adapter, merge
    from lorasmith.memory.estimate import Plan
    from lorasmith.model.model import Model
    from lorasmith.recipe import plan
    from lorasmith.types import Batch, Completion, Conversation, Example, Layout, Message, Piece

_HOME = {
    "lorasmith.api": (
        "Evaluation Run chat download evaluate generate load_dataset load_model load_module train verify"
    ),
    "lorasmith.config": "DataConfig GenerateConfig LoraConfig ModelConfig RunConfig TrainConfig",
    "lorasmith.errors": "LorasmithError",
    "lorasmith.handover": "convert_adapter merge",
    "lorasmith.model.model": "Model",
    "lorasmith.recipe": "plan",
    "lorasmith.memory.estimate": "Plan",
    "lorasmith.types": "Batch Completion Conversation Example Layout Message Piece",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "Batch",
    "Completion",
    "Conversation",
    "DataConfig",
    "Evaluation",
    "Example",
    "GenerateConfig",
    "Layout",
    "LoraConfig",
    "LorasmithError",
    "Message",
    "Model",
    "ModelConfig",
    "Piece",
    "Plan",
    "Run",
    "RunConfig",
    "TrainConfig",
    "chat",
    "convert_adapter",
    "download",
    "evaluate",
    "generate",
    "load_dataset",
    "load_model",
    "load_module",
    "merge",
    "plan",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # a tenth of a second

        return version("lorasmith")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
