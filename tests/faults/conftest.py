"""The arena of the fault tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from arena import Arena
from fork_server import ForkServer
from modules import tiny_module


@pytest.fixture(scope="session")
def arena() -> Iterator[Arena]:
    memory = Path("/dev/shm")  # syncs cost nothing there, and a kill spares it as it spares a disk
    root = Path(tempfile.mkdtemp(prefix="lorasmith-faults-", dir=memory if memory.is_dir() else None))
    tiny_module("llama3", torch.float32, num_hidden_layers=1).save_pretrained(root / "base")
    server = ForkServer(root / "base")
    yield Arena(server, root)
    server.close()
    shutil.rmtree(root)
