"""Write the table of docs/reliability.md from what the tests counted: write_figures.py [--check]

The counts are in benchmarks/reliability.json, which LORASMITH_FIGURES=benchmarks/reliability.json makes a run
of the tests write. With --check nothing is written, and the exit code is 1 if the page says something else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURES = ROOT / "docs" / "reliability.md", ROOT / "benchmarks" / "reliability.json"
BEGIN = "<!-- figures: from benchmarks/reliability.json by scripts/write_figures.py (make docs) -->\n"
END = "<!-- end -->\n"
ROWS = {
    "kill_sweep_of_a_run": "a kill at every system call of a run",
    "kill_sweep_of_a_resume": "a kill at every system call of a resume",
    "kill_sweep_of_a_save_and_a_retention": "a kill wherever a save and a retention change the disk",
    "kill_sweep_of_a_merge": "a kill wherever a merge changes the disk",
    "kill_sweep_of_a_conversion": "a kill wherever a conversion of an adapter changes the disk",
    "random_kills_300": "SIGKILLs that hit, in 300 trials at random moments of a run, resumed to equal bytes",
    "random_kills_of_a_merge_60": "SIGKILLs that hit, in 60 trials at random moments of a merge",
    "errno_sweep_of_a_run": "an error at a system call of a run",
    "errno_sweep_of_a_resume": "an error at a system call of a resume",
    "errno_sweep_of_a_save_and_a_retention": "an error at two of three calls of a save and a retention",
    "errno_sweep_of_a_merge": "an error at a system call of a merge",
    "errno_sweep_of_a_conversion": "an error at a system call of a conversion",
    "SIGINT_at_random_moments": "SIGINTs at random moments, until a run has heard 20, resumed to equal bytes",
    "SIGTERM_at_random_moments": "SIGTERMs, in the same way",
    "SIGHUP_at_random_moments": "SIGHUPs, in the same way",
    "SIGUSR1_at_random_moments": "SIGUSR1s, in the same way",
    "real_full_disk_at_each_call_of_a_run": "a disk that is really full from a system call of a run on",
    "real_read_only_disk_at_each_call_of_a_run": "a mount that is read-only from a system call of a run on",
    "power_cuts": "states of the disk after a power cut during a run",
    "cache_races": "races of four processes for one data cache, its files damaged on the way",
    "resume_cells": "cells of model x adapter whose resume is the uninterrupted run bit by bit",
    "bad_rows": "bad rows, in JSONL, arrays, chats and CSV, told with file and exact line",
}


def main(arguments: Sequence[str]) -> int:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    table = _table(figures)
    if "--check" not in arguments:
        PAGE.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    elif written != table:
        print("docs/reliability.md is not what the figures say: run make docs", file=sys.stderr)
        return 1
    return 0


def _table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Every row must have been counted. Raises: KeyError."""
    lines = [f"| trial | {figures['taken']['date']}: tried | survived |", "|---|--:|--:|"]
    for name, told in ROWS.items():
        tried, survived = _counts(figures[name])
        lines.append(f"| {told} | {tried:,} | {survived:,} |")
    return "\n".join(lines) + "\n"


def _counts(found: Mapping[str, int]) -> tuple[int, int]:
    """A sweep says how many trials survived, once all have; of single cases each that passed left a 1."""
    for name in ("states", "kills"):  # each was judged; a kill that came too late is none
        if name in found:
            return found[name], found[name]
    if "survived" in found:
        return found.get("trials", found.get("calls", 0)), found["survived"]
    return len(found), sum(found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
