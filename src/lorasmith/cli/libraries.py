"""torch, transformers and peft, loaded in one go and in less time."""

from __future__ import annotations

import atexit
import gc
from importlib import import_module


def load_libraries() -> None:
    """All that training imports. It is a million objects that stay, which Python's collector would walk over
    and over for a fifth of the time to the first step: here it rests, and leaves them out ever after.

    For a program of our own alone: what a user's program has made by then would be left out too.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        import_module("lorasmith.training.session")
        import_module("transformers.models.auto.modeling_auto")
    finally:
        if was_on:
            gc.freeze()
            atexit.register(gc.unfreeze)  # triton reports what nobody freed at the end
            gc.enable()
