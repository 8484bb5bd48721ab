"""The clock of a contestant, which runs in a process of its own: reads its job, writes what it measured.

Tokens are those of the rows, counted as they enter the model: no padding, nothing shared. The first
`warm_up` steps are not timed. Memory is the process's peak until training ended.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What throughput.py asks of one process."""

    contestant: str
    model: str
    rows: str
    output: str
    """An empty directory."""
    result: str
    """JSON file to write."""
    started: float
    """time.time() when the process was started."""
    dtype: str
    steps: int
    """Optimizer steps, warm-up included."""
    warm_up: int
    samples: int
    """Rows per optimizer step."""
    learning_rate: float
    seed: int
    pad_id: int
    targets: list[str]
    own_classes: bool
    """The model's class is not in transformers: it is lorasmith's native one, for every contestant."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def read_rows(self) -> list[dict[str, list[int]]]:
        return json.loads(Path(self.rows).read_text())  # type: ignore[no-any-return]


def read_job() -> Job:
    """The job whose file is the first argument. Seeds Python and torch."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    random.seed(job.seed)
    torch.manual_seed(job.seed)
    return job


def load_model(job: Job) -> PreTrainedModel:
    """The way the tutorials load it, less remote code."""
    if job.own_classes:
        from lorasmith.native.registry import register_native

        register_native()
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=job.torch_dtype)


class Meter:
    """Times and tokens of the optimizer steps."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._tokens = self._computed = 0
        self._times: list[float] = []
        self._cpu_times: list[float] = []
        self._counts: list[tuple[int, int]] = []
        self._startup = 0.0

    def begin(self) -> None:
        """Training begins now; everything before was start-up."""
        self._startup = time.time() - self.job.started

    def saw(self, input_ids: Tensor) -> None:
        """A micro-batch entered the model."""
        self._tokens += int((input_ids != self.job.pad_id).sum())
        self._computed += input_ids.numel()

    def count(self, tokens: int, computed: int) -> None:
        self._tokens += tokens
        self._computed += computed

    def step_ended(self) -> None:
        self._times.append(time.perf_counter())
        self._cpu_times.append(time.process_time())
        self._counts.append((self._tokens, self._computed))

    def write(self, model: nn.Module, **more: Any) -> None:
        """Call once, right after training: memory is read first, then the loss over all rows."""
        peak = peak_bytes()
        first = self.job.warm_up - 1
        tokens, computed = (
            last - then for last, then in zip(self._counts[-1], self._counts[first], strict=True)
        )
        seconds = self._times[-1] - self._times[first]
        if not tokens:
            raise RuntimeError("no token entered the model: this contestant trained on nothing")
        result = {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "cpu_seconds": self._cpu_times[-1] - self._cpu_times[first],
            "tokens": tokens,
            "computed_tokens": computed,
            "steps": len(self._times) - self.job.warm_up,
            "startup_seconds": self._startup,
            "peak_bytes": peak,
            "loss": loss_of_rows(model, self.job.read_rows(), self.job.pad_id),
            **more,
        }
        Path(self.job.result).write_text(json.dumps(result))


class MeterCallback(TrainerCallback):  # type: ignore[misc]
    """The meter in a transformers Trainer; `watch` makes it count what enters a model."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.step_ended()

    def _count(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if model.training:
            self.meter.saw(kwargs["input_ids"])


def pack_length(rows: Sequence[dict[str, list[int]]], rows_per_pack: float) -> int:
    """Tokens of a pack that holds so many rows on average: what the rows need and 2 % for the gaps."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    return math.ceil(1.02 * tokens * rows_per_pack / len(rows))


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def loss_of_rows(model: nn.Module, rows: Sequence[dict[str, list[int]]], pad_id: int) -> float:
    """Nats per supervised token over all rows, without dropout."""
    model.eval()
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(by_length), 16):
        batch = by_length[start : start + 16]
        ids = _padded([row["input_ids"] for row in batch], pad_id)
        labels = _padded([row["labels"] for row in batch], -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=(ids != pad_id).long()).logits[:, :-1]
        taught = labels != -100
        total += F.cross_entropy(logits[taught].float(), labels[taught], reduction="sum").item()
        count += int(taught.sum())
    return total / count


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )
