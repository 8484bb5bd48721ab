"""Loading torch, transformers and peft for a run: Python's collector is as it was afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import gc, sys
from lorasmith.cli.libraries import load_libraries
{before}
load_libraries()
print(gc.isenabled(), gc.get_freeze_count() > 100_000, "peft" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "told"), [("", "True True True"), ("gc.disable()", "False False True")])
def test_the_collector_is_as_it_was_and_leaves_out_what_was_loaded(before: str, told: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (told, "")
