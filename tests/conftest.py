"""What every test may ask for."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from hypothesis import settings

# Tiny tensors: more threads only wait for each other. Before torch is loaded, and for every subprocess too.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests neither read nor fill the user's own cache; one of their own is gone with the process.
_CACHE = tempfile.TemporaryDirectory(prefix="lorasmith-cache-")
os.environ["LORASMITH_CACHE"] = _CACHE.name

# What a shell starts in the background ignores Ctrl-C, and under nohup SIGHUP: their tests would fail.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A suite passes or fails by the code alone. HYPOTHESIS_PROFILE=fresh draws other cases each time.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.register_profile("fresh", database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that lies beside the checkout and may not be copied into it."""
    if not (_SHARED / "golden").is_dir():
        pytest.skip("no reference data beside this checkout (../shared)")
    return _SHARED


@pytest.fixture(scope="session")
def figures() -> Callable[..., None]:
    """Call with a name and numbers: they join those under that name in the JSON file that LORASMITH_FIGURES
    names, from which `make docs` writes the table of docs/reliability.md."""

    def record(name: str, **numbers: float) -> None:
        if "LORASMITH_FIGURES" not in os.environ:
            return
        with open(os.environ["LORASMITH_FIGURES"], "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            tree = json.loads(file.read() or "{}")
            tree["taken"] = {"date": str(date.today()), "machine": platform.machine()}
            tree[name] = {**tree.get(name, {}), **numbers}
            file.truncate(0)
            file.write(json.dumps(tree, indent=1, sort_keys=True) + "\n")

    return record


@pytest.fixture
def passed(figures: Callable[..., None], request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call at the end of a parametrised test, with the name under which its cases are counted."""
    case = "-".join(map(str, request.node.callspec.indices.values()))
    return lambda name: figures(name, **{f"{request.function.__name__}-{case}": 1})
