"""Threads or processes for tokenising: workers.py FAMILY=DIRECTORY... [--rows 100000]

The rows of data_scale.py are read, checked and encoded, uncached, with the tokenizer of each model
directory: by one process with one thread, by one with the tokenizer's own threads, and by several
processes (what `data/workers.py` does from its 20,000th row on). Every way runs in a fresh process. Writes
workers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from data_scale import machine, write_rows

from lorasmith.config import DataConfig
from lorasmith.data.dataset import fingerprint
from lorasmith.data.survey import survey
from lorasmith.families.opening import open_chat

SECONDS = ("wall_s", "cpu_s", "serial_s")


class Way(NamedTuple):
    workers: int
    threads: bool


def ways(cores: int) -> dict[str, Way]:
    counts = sorted({2, cores} - {1})
    processes = {f"{count} processes": Way(count, True) for count in counts}
    return {"1 thread": Way(1, False), f"{cores} threads": Way(1, True), **processes}


def measure(family: str, directory: Path, path: Path, workers: int) -> dict[str, Any]:
    """Seconds of one survey: `cpu_s` of all processes; `serial_s` of what stays in the first process, which
    more cores do not shorten (its main thread, or all its threads where other processes encode)."""
    chat_format = open_chat(directory, family)[1]
    started, before, alone = time.perf_counter(), os.times(), time.thread_time()
    found = survey(str(path), DataConfig(train=str(path), cache=False), chat_format, workers=workers)
    wall, after, alone = time.perf_counter() - started, os.times(), time.thread_time() - alone
    own = sum(after[:2]) - sum(before[:2])
    return {
        "wall_s": wall,
        "cpu_s": own + sum(after[2:4]) - sum(before[2:4]),
        "serial_s": alone if workers == 1 else own,
        "fingerprint": fingerprint(found.examples),
    }


def compare(model: str, path: Path) -> dict[str, Any]:
    told: dict[str, dict[str, Any]] = {}
    family = model.partition("=")[0]
    for name, (workers, threads) in ways(len(os.sched_getaffinity(0))).items():
        environment = os.environ | {"TOKENIZERS_PARALLELISM": str(threads).lower()}
        command = [sys.executable, __file__, model, "--measure", str(path), str(workers)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True)
        told[name] = json.loads(done.stdout)
        print(f"{family:12} {name:12}", *(f"{key} {told[name][key]:7.1f}" for key in SECONDS), flush=True)
    assert len({one["fingerprint"] for one in told.values()}) == 1, "the ways do not agree"
    seconds = {name: {key: round(one[key], 2) for key in SECONDS} for name, one in told.items()}
    return {"family": family, "ways": seconds}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("models", nargs="+", metavar="FAMILY=DIRECTORY")
    asked.add_argument("--rows", type=int, default=100_000)
    asked.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = asked.parse_args()
    if args.measure:
        path, workers = args.measure
        family, _, directory = args.models[0].partition("=")
        print(json.dumps(measure(family, Path(directory), Path(path), int(workers))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.json"
        write_rows(path, args.rows)
        results = [compare(model, path) for model in args.models]
    told = {"rows": args.rows, "date": date.today().isoformat(), "machine": machine(), "results": results}
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
