"""Lorasmith through its public front door, with the tutorial's hyperparameters, dropout included.

Options: share_prefixes (bool, or null where this version has no such setting), dropout (float).
"""

from __future__ import annotations

import numpy as np
from measure import Job, Meter, read_job

import lorasmith as ls
from lorasmith.batching.loader import training_loader
from lorasmith.runs.progress import SilentReporter
from lorasmith.types import Example


class MeterReporter(SilentReporter):
    """The meter behind the trainer's own progress interface."""

    def __init__(self, meter: Meter, tokens_of_step: list[tuple[int, int]]) -> None:
        self._meter, self._tokens_of_step = meter, tokens_of_step

    def start(self, step: int, total_steps: int) -> None:
        self._meter.begin()

    def advance(self, step: int) -> None:
        self._meter.count(*self._tokens_of_step[step - 1])
        self._meter.step_ended()


def main(job: Job) -> None:
    meter = Meter(job)
    module = ls.load_module(job.model, dtype=job.dtype)
    examples = [_example(row) for row in job.read_rows()]
    train = _train_config(job, len(examples))
    loader = training_loader(examples, train, packed=True)
    counts = []
    for step in range(job.steps):
        # A row's last token is only predicted, so one more of it is real than is computed.
        real = sum(len(example) + 1 for example in loader.examples(step))
        counts.append((real, sum(len(batch.input_ids) for batch in loader.step(step))))
    lora = ls.LoraConfig(lora_dropout=job.options["dropout"], target_modules=job.targets)
    ls.train(
        module,
        examples,
        output_dir=job.output,
        lora=lora,
        train=train,
        reporter=MeterReporter(meter, counts),
    )
    meter.write(module, supervised_tokens=_supervised(loader, job))


def _train_config(job: Job, num_rows: int) -> ls.TrainConfig:
    sharing = job.options["share_prefixes"]
    return ls.TrainConfig(
        batch_size=job.samples,
        learning_rate=job.learning_rate,
        lr_scheduler="linear",
        warmup_ratio=0.0,
        num_epochs=-(-job.steps * job.samples // num_rows),
        max_steps=job.steps,
        shuffle=False,  # as every contestant here: the same rows in the same steps
        seed=job.seed,
        **({} if sharing is None else {"share_prefixes": sharing}),
    )


def _example(row: dict[str, list[int]]) -> Example:
    return Example(np.array(row["input_ids"][:-1]), np.array(row["labels"][1:]))


def _supervised(loader: object, job: Job) -> int:
    """Places of the timed steps where the head has to be computed."""
    steps = range(job.warm_up, job.steps)
    return sum(int((batch.labels != -100).sum()) for n in steps for batch in loader.step(n))


if __name__ == "__main__":
    main(read_job())
