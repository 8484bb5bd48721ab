"""A guard against slow-downs: Lorasmith over the expert's Trainer on a tiny model, alternating in one run.

    python benchmarks/guard.py

A ratio within one run means the same on every machine. Exits 1 if it falls below LEAST_RATIO. Needs no data:
rows are random ids with the lengths of real ones and a shared beginning.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from throughput_cases import SHAPES, pad_id, write_model

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import ours
import tutorial
from measure import Job
from throughput_jobs import BY_NAME

LEAST_RATIO = 1.3
ROUNDS, STEPS, WARM_UP, NUM_ROWS = 3, 6, 1, 64
SHARED_TOKENS, MEAN_LENGTH, MEAN_ANSWER = 11, 64, 24


def main() -> int:
    torch.set_num_threads(1)  # threads of small products wait for each other on a busy machine
    expert: list[float] = []
    lorasmith: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        vocab_size = write_model(SHAPES["tiny"], None, 0, Path(scratch) / "model")
        (Path(scratch) / "rows.json").write_text(json.dumps(_rows(vocab_size)))
        for turn in range(ROUNDS):
            expert.append(_speed(tutorial.main, "expert", turn, Path(scratch), vocab_size))
            lorasmith.append(_speed(ours.main, "ours", turn, Path(scratch), vocab_size))
    # The best of each: whatever else the machine does only ever takes time away.
    ratio = max(lorasmith) / max(expert)
    print(f"Lorasmith {max(lorasmith):,.0f} tokens/s, Trainer {max(expert):,.0f}: {ratio:.2f} times")
    if ratio < LEAST_RATIO:
        print(
            f"that is below {LEAST_RATIO}: training became slower, or the machine stood still; run it again"
        )
        return 1
    return 0


def _speed(train: Callable[[Job], None], name: str, turn: int, scratch: Path, vocab_size: int) -> float:
    """Tokens per second of one short run, in this process."""
    folder = scratch / f"{name}-{turn}"
    folder.mkdir()
    result = scratch / f"{name}-{turn}.json"
    job = Job(
        contestant=name,
        model=str(scratch / "model"),
        rows=str(scratch / "rows.json"),
        output=str(folder),
        result=str(result),
        started=time.time(),
        dtype="fp32",
        steps=STEPS + WARM_UP,
        warm_up=WARM_UP,
        samples=16,
        learning_rate=1e-4,
        seed=0,
        pad_id=pad_id(vocab_size),
        targets=list(SHAPES["tiny"].targets),
        own_classes=False,
        options=dict(BY_NAME[name].options),
    )
    train(job)
    return float(json.loads(result.read_text())["tokens_per_second"])


def _rows(vocab_size: int) -> list[dict[str, list[int]]]:
    """Lengths are exponential, as those of dialogues nearly are."""
    draw = random.Random(0)
    shared = [draw.randrange(vocab_size - 16) for _ in range(SHARED_TOKENS)]
    asked = MEAN_LENGTH - SHARED_TOKENS - MEAN_ANSWER
    rows = []
    for _ in range(NUM_ROWS):
        lengths = [1 + int(draw.expovariate(1 / mean)) for mean in (asked, MEAN_ANSWER)]
        prompt, answer = ([draw.randrange(vocab_size - 16) for _ in range(length)] for length in lengths)
        ids = shared + prompt + answer
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - len(answer)) + answer})
    return rows


if __name__ == "__main__":
    sys.exit(main())
