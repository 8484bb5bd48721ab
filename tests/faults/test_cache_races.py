"""Several processes fill one cache of encoded rows, while its files are damaged: all read the right rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROCESSES, ROUNDS = 4, 50
RACER = """
import hashlib, json, os, sys, time, warnings
from pathlib import Path
from lorasmith.config import DataConfig
from lorasmith.data.cache import Cache
from lorasmith.data.dataset import fingerprint
from lorasmith.data.survey import survey
from lorasmith.families.opening import open_chat

source, directory, model, rounds, me = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
chat_format, cache = open_chat(Path(model))[1], Cache(Path(directory), min_rows=1, max_bytes=200_000)
warnings.simplefilter("ignore")

def read(n, **how):
    config = DataConfig(train=source, system=f"round {n}", **how)
    found = survey(source, config, chat_format, workers=1, cache=cache)
    return [fingerprint(found.examples), len(found.conversations), found.report.tokens.total]

def damage(n):
    for path in Path(directory).glob("*.rows"):  # by a rename: other processes have the old file mapped
        data = bytearray(path.read_bytes())
        data[n * 37 % len(data)] ^= 1
        other = path.with_suffix(f".damaged-{n}")
        other.write_bytes(data[: len(data) // 2] if n % 2 else data)
        os.replace(other, path)

for n in range(rounds):
    print("ready", flush=True)
    sys.stdin.readline()
    if me == 0 and n % 3 == 2:
        damage(n)
    print(json.dumps([read(n), read(max(0, n - 1)), read(n, cache=False)]), flush=True)
"""


@pytest.mark.slow
def test_four_processes_race_for_one_cache(tmp_path: Path, figures: Callable[..., None]) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (json.dumps({"prompt": f"question {n}", "completion": f"answer {n * n}"}) for n in range(60))
    rows.write_text("\n".join(lines) + "\n")
    tiny = Path(__file__).parents[2] / "src/lorasmith/assets/tiny"
    args = [str(rows), str(tmp_path / "cache"), str(tiny), str(ROUNDS)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, *args, str(me)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        for me in range(PROCESSES)
    ]
    earlier: list[object] = []
    for n in range(ROUNDS):
        answers = [json.loads(answer) for answer in _round(racers)]
        assert {json.dumps(one[0]) for one in answers} == {json.dumps(answers[0][2])}, n
        assert all(one[1] == (earlier or one[2]) for one in answers), n
        earlier = answers[0][2]
    assert [racer.wait(timeout=60) for racer in racers] == [0] * PROCESSES
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert left == {".rows"}, left
    figures("cache_races", trials=ROUNDS, survived=ROUNDS)


def _round(racers: list[subprocess.Popen[str]]) -> list[str]:
    """All wait until all are ready, then begin at once."""
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    return [racer.stdout.readline() for racer in racers if racer.stdout is not None]
