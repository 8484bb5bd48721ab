"""LLaMA-Factory with neat_packing, in its own environment: benchmarks/README.md says how to make it.

Its loader, packing, collator and trainer run as they are. Only the ids of a row come from the job, in place
of its tokenizer's: on DeepSeek's vocabulary that one loses every Chinese character and trains on empty text.
Options: packs (packs a time), accumulate (micro-batches a step), attention. A step is 16 rows on average.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

from measure import Job, Meter, MeterCallback, pack_length, read_job


def main(job: Job) -> None:
    _without_audio()
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.train.tuner import run_exp

    rows = job.read_rows()

    def ids_of_row(self: Any, prompt: list[dict[str, str]], **kwargs: Any) -> tuple[list[int], list[int]]:
        row = rows[int(prompt[0]["content"])]
        return list(row["input_ids"]), list(row["labels"])

    SupervisedDatasetProcessor._encode_data_example = ids_of_row
    _register(len(rows), Path(job.output))
    ending = WriteAtEnd(Meter(job))
    run_exp(_arguments(job), callbacks=[ending])


class WriteAtEnd(MeterCallback):
    """run_exp returns nothing, so the result is written when training ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.write(kwargs["model"])


def _without_audio() -> None:
    """It imports torchaudio whatever it trains, which has no build for current CPU torch: text needs none."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        absent = types.ModuleType("torchaudio")
        absent.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = absent


def _register(num_rows: int, directory: Path) -> None:
    """Rows by number, in the form that its dataset_info.json asks for."""
    named = [{"instruction": str(number), "input": "", "output": "0"} for number in range(num_rows)]
    (directory / "rows.json").write_text(json.dumps(named))
    (directory / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))


def _arguments(job: Job) -> dict[str, Any]:
    packs_per_step = job.options["packs"] * job.options["accumulate"]
    length = pack_length(job.read_rows(), job.samples / packs_per_step)
    return {
        "model_name_or_path": job.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target": ",".join(job.targets),
        "dataset": "rows",
        "dataset_dir": job.output,
        "template": "empty",
        "cutoff_len": -(-length // 8) * 8,  # its collator pads ids to multiples of 8, and positions not
        "packing": True,
        "neat_packing": True,
        "flash_attn": {"eager": "disabled"}.get(job.options["attention"], job.options["attention"]),
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "overwrite_cache": True,
        "output_dir": str(Path(job.output) / "run"),
        "per_device_train_batch_size": job.options["packs"],
        "gradient_accumulation_steps": job.options["accumulate"],
        "learning_rate": job.learning_rate,
        "max_steps": job.steps,
        "save_strategy": "no",
        "logging_steps": 10,
        "pure_bf16": job.dtype == "bf16",
        "use_cpu": True,
        "seed": job.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


if __name__ == "__main__":
    main(read_job())
