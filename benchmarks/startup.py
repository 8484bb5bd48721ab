"""From the command `lorasmith demo` to its first optimizer step, by phases: startup.py [--rounds 3]

Every round is a fresh process; the least of the rounds is told, of wall time and of CPU time (with that of
child processes), counted from the start of the process. The first round warms the disk and is left out.
Writes startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

PHASES = ("rows read and checked", "libraries loaded", "first step taken")
_STARTED = time.perf_counter()


def tell() -> None:
    """One line of JSON: seconds since this process began to run Python, and its CPU seconds."""
    told = {"wall_s": time.perf_counter() - _STARTED, "cpu_s": sum(os.times()[:4])}
    print(json.dumps(told), file=sys.stderr, flush=True)


def demo_to_first_step(run_dir: Path) -> None:
    """The command itself, in this process, which ends behind its first update."""
    from lorasmith.cli import libraries, main

    load = libraries.load_libraries

    def load_and_tell() -> None:
        tell()
        load()
        tell()
        from lorasmith.training import loop

        patch.object(loop, "update", ends(loop.update)).start()

    sys.argv = ["lorasmith", "demo", "--output-dir", str(run_dir)]
    with patch.object(libraries, "load_libraries", load_and_tell):
        main.main()


def ends(update: Callable[..., None]) -> Callable[..., None]:
    def update_and_end(*args: Any) -> None:
        update(*args)
        tell()
        os._exit(0)

    return update_and_end


def measured_round() -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--run", f"{scratch}/run"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken = time.perf_counter() - started
    phases = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    before = max(0.0, taken - phases[-1]["wall_s"])  # until Python ran, and after it ended
    return [{**phase, "wall_s": phase["wall_s"] + before} for phase in phases]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.run:
        demo_to_first_step(args.run)
        return
    from data_scale import machine

    described = machine()
    rounds = [measured_round() for _ in range(args.rounds + 1)][1:]
    results = [
        {"phase": name, **{key: min(one[n][key] for one in rounds) for key in ("wall_s", "cpu_s")}}
        for n, name in enumerate(PHASES)
    ]
    told = {"date": date.today().isoformat(), "machine": described, "rounds": args.rounds, "results": results}
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for row in results:
        print(f"{row['phase']:24} {row['wall_s']:6.2f} s  {row['cpu_s']:6.2f} s of CPU")


if __name__ == "__main__":
    main()
