"""Does a long run grow? Resident memory, open files and threads over 2,000 steps of a tiny model.

With checkpoints and logging as in a real run: looked at before each save, which gives back what malloc kept,
and after the step that follows it. Writes soak.json and soak.png.
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

SAVE_STEPS = 100
VOCABULARY = 512


class Watch(SilentReporter):
    """Looks at its own process around each save."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self._process = psutil.Process()

    def advance(self, step: int) -> None:
        if step % SAVE_STEPS in (0, 1) and step > 1:
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
            max_steps=steps, num_epochs=steps, batch_size=8, save_steps=SAVE_STEPS, logging_steps=10
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
        for after, color, label in ((0, "#9db8d6", "before a save"), (1, "#1f4e8c", "after it")):
            some = [at for at in seen if at["step"] % SAVE_STEPS == after]
            axes.plot([at["step"] for at in some], [at[key] for at in some], color=color, label=label)
        axes.set_ylim(0, 1.3 * max(at[key] for at in seen))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
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
    for after, name in ((0, "before"), (1, "after")):
        late = [at for at in seen[len(seen) // 2 :] if at["step"] % SAVE_STEPS == after]
        slope = np.polyfit([at["step"] for at in late], [at["memory_mb"] for at in late], 1)[0] * 1000
        print(f"{name} saves: {late[-1]['memory_mb']:.1f} MB at the end, {slope:+.2f} MB per 1,000 steps")
    print(f"files {sorted({at['files'] for at in seen})}, threads {sorted({at['threads'] for at in seen})}")


if __name__ == "__main__":
    main()
