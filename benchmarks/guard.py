"""A guard against slow-downs: Lorasmith over the expert's Trainer on a tiny model, alternating in one run.

    python benchmarks/guard.py

A ratio within one run means the same on every machine. Exits 1 if it falls below LEAST_RATIO, which is about
half of what is measured, so that a busy machine does not fail it. Needs no data: rows are random ids with the
lengths of real ones and a shared beginning.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

from throughput_cases import SHAPES, pad_id, write_model
from throughput_jobs import BY_NAME, Setting, run

LEAST_RATIO = 1.5
ROUNDS, STEPS, WARM_UP, NUM_ROWS = 2, 8, 2, 64
SHARED_TOKENS, MEAN_LENGTH, MEAN_ANSWER = 11, 64, 24


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        setting = _prepare(Path(scratch))
        speeds: dict[str, list[float]] = {"expert": [], "ours": []}
        for _ in range(ROUNDS):
            for name, of_rounds in speeds.items():
                of_rounds.append(run(BY_NAME[name], setting, "fp32")["tokens_per_second"])
    # The best of each: whatever else the machine does only ever takes time away.
    expert, ours = max(speeds["expert"]), max(speeds["ours"])
    ratio = ours / expert
    print(f"Lorasmith {ours:,.0f} tokens/s, the expert's Trainer {expert:,.0f}: {ratio:.2f} times")
    if ratio < LEAST_RATIO:
        print(
            f"that is below {LEAST_RATIO}: training became slower, or the machine stood still; run it again"
        )
        return 1
    return 0


def _prepare(scratch: Path) -> Setting:
    shape = SHAPES["tiny"]
    vocab_size = write_model(shape, None, 0, scratch / "model")
    (scratch / "rows.json").write_text(json.dumps(_rows(vocab_size)))
    return Setting(
        model=scratch / "model",
        rows=scratch / "rows.json",
        pad_id=pad_id(vocab_size),
        targets=shape.targets,
        own_classes=False,
        steps=STEPS + WARM_UP,
        warm_up=WARM_UP,
        threads=1,  # threads of small products wait for each other on a busy machine
    )


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
