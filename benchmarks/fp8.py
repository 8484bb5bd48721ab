"""What a base in fp8 costs in loss: the demo's training, with train.fp8_base and without, on a CPU.

    python benchmarks/fp8.py [--steps 120] [--seeds 3] [--out benchmarks/fp8.json]

On a CPU fp8 products are their definition, computed in fp32: this measures rounding, never speed. Each run is
evaluated as it trained (`trained`: held-out loss with the base in fp8) and as its adapter is used (`used`:
over the base's own weights).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import lorasmith as ls
from lorasmith.config import load_run_config
from lorasmith.data.dataset import Dataset
from lorasmith.model.fp8 import fp8_base, frozen_linears
from lorasmith.model.model import Model
from lorasmith.model.packed import packed
from lorasmith.runs.metrics import read_metrics
from lorasmith.runs.progress import SilentReporter
from lorasmith.testing.model_laws import step_rows

ASSETS = Path(str(resources.files("lorasmith") / "assets"))
CASES = {dtype + " + fp8" * fp8: (dtype, fp8) for dtype in ("fp32", "bf16") for fp8 in (False, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a base in fp8 costs in loss.")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out")
    asked = parser.parse_args()
    report = {
        "date": time.strftime("%F"),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "steps": asked.steps,
        "first_step": first_step(),
        "runs": {
            name: [train(*case, seed, asked.steps) for seed in range(asked.seeds)]
            for name, case in CASES.items()
        },
    }
    print(json.dumps(report, indent=1))
    if asked.out:
        Path(asked.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def load(dtype: Any) -> tuple[Model, Dataset]:
    model = ls.load_model(str(ASSETS / "tiny"), dtype=dtype, device="cpu")
    return model, ls.load_dataset(str(ASSETS / "persona.jsonl"), model, eval=0.05)


def first_step() -> dict[str, float]:
    """The base's logits over the first 16 rows: norm of their difference, share of the same likeliest tokens;
    and the bytes of the weights that fp8 halves."""
    model, data = load("fp32")
    model.module.requires_grad_(False)
    rows = step_rows(model.module, data.examples[:16])
    with torch.no_grad(), packed(model.module) as module:
        own, rounded = (torch.cat([_logits(module, fp8, row) for row in rows]) for fp8 in (False, True))
    weights = sum(linear.weight.numel() for linear in frozen_linears(model.module))
    scales = sum(linear.out_features for linear in frozen_linears(model.module))
    return {
        "logits_relative": float((own - rounded).norm() / own.norm()),
        "same_likeliest": float((own.argmax(-1) == rounded.argmax(-1)).float().mean()),
        "bf16_bytes": 2 * weights,
        "fp8_bytes": weights + 4 * scales,
    }


def _logits(module: Any, fp8: bool, row: Any) -> torch.Tensor:
    with fp8_base(module.module, enabled=fp8):
        return torch.as_tensor(module.logits(module.to_device(row)))


def train(dtype: str, fp8: bool, seed: int, steps: int) -> dict[str, Any]:
    """Losses: of each tenth of the steps, and held-out."""
    model, data = load(dtype)
    recipe = load_run_config(ASSETS / "demo.yaml", {})
    every = {"max_steps": steps, "logging_steps": max(1, steps // 10), "save_steps": steps}
    how = recipe.train.model_copy(update={**every, "seed": seed, "fp8_base": fp8, "golden_rows": 0})
    with tempfile.TemporaryDirectory() as folder:
        target: dict[str, Any] = {"output_dir": Path(folder) / "run", "reporter": SilentReporter()}
        run = ls.train(model, data, lora=recipe.lora, train=how, **target)
        losses = [line["loss"] for line in read_metrics(run.output_dir) if "loss" in line]
    used = ls.evaluate(model, data).loss
    assert run.eval_loss_after is not None
    return {"losses": losses, "trained": run.eval_loss_after, "used": used, "mean_loss": fmean(losses)}


if __name__ == "__main__":
    main()
