"""The arena of the fault tests, and the figures they leave for the documentation."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from arena import Arena
from fork_server import ForkServer
from modules import tiny_module

FIGURES = "LORASMITH_FIGURES"
"""Names a JSON file to which the tests add what they counted."""


@pytest.fixture(scope="session")
def arena() -> Iterator[Arena]:
    memory = Path("/dev/shm")  # syncs cost nothing there, and a kill spares it as it spares a disk
    root = Path(tempfile.mkdtemp(prefix="lorasmith-faults-", dir=memory if memory.is_dir() else None))
    tiny_module("llama3", torch.float32, num_hidden_layers=1).save_pretrained(root / "base")
    server = ForkServer(root / "base")
    yield Arena(server, root)
    server.close()
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def figures() -> Callable[..., None]:
    """Call with a name and numbers: they go under that name into the file that LORASMITH_FIGURES names."""

    def record(name: str, **numbers: float) -> None:
        if FIGURES not in os.environ:
            return
        with open(os.environ[FIGURES], "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            tree = json.loads(file.read() or "{}")
            file.truncate(0)
            json.dump(dict(sorted({**tree, name: numbers}.items())), file, indent=2)

    return record
