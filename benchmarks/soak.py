"""Does a long run grow? Resident memory, open files and threads over 2,000 steps of a tiny model.

With checkpoints, held-out evaluations and logging as in a real run. Writes soak.json and soak.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

import lorasmith as ls
from lorasmith.runs.progress import SilentReporter
from lorasmith.types import Example

EVERY = 50
VOCABULARY = 512


class Watch(SilentReporter):
    """Looks at its own process every so many steps."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self._process = psutil.Process()

    def advance(self, step: int) -> None:
        if step % EVERY == 0:
            self.seen.append(
                {
                    "step": step,
                    "memory_mb": self._process.memory_info().rss / 1e6,
                    "files": self._process.num_fds(),
                    "threads": self._process.num_threads(),
                }
            )


def rows(count: int) -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(20, 120, count)
    ids = [draw.integers(0, VOCABULARY, length) for length in lengths]
    return [
        Example(x, np.where(np.arange(len(x)) > len(x) // 2, x, -100), f"row {n}") for n, x in enumerate(ids)
    ]


def soak(steps: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(f"{folder}/base")
        train = ls.TrainConfig(
            max_steps=steps, num_epochs=steps, batch_size=8, save_steps=100, logging_steps=10
        )
        lora = ls.LoraConfig(r=4, lora_dropout=0.1)
        module = ls.load_module(f"{folder}/base", dtype="fp32")
        ls.train(module, rows(400), output_dir=f"{folder}/run", lora=lora, train=train, reporter=watch)
    return watch.seen


def draw(seen: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 3),
        {"memory_mb": "resident memory, MB", "files": "open files", "threads": "threads"}.items(),
        strict=True,
    ):
        axes.plot([at["step"] for at in seen], [at[key] for at in seen], color="#1f4e8c")
        axes.set_ylim(0, 1.3 * max(at[key] for at in seen))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    seen = soak(asked.steps)
    told = {"date": str(date.today()), "machine": platform.machine(), "steps": asked.steps, "seen": seen}
    asked.out.write_text(json.dumps(told, indent=1) + "\n")
    draw(seen, asked.out.with_suffix(".png"))
    for at in (seen[0], seen[len(seen) // 2], seen[-1]):
        told = f"{at['memory_mb']:7.1f} MB  {at['files']:3.0f} files  {at['threads']:3.0f} threads"
        print(f"step {at['step']:5.0f}  {told}")


if __name__ == "__main__":
    main()
