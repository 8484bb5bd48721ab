"""Who trains how fast on one CUDA device: Llama-3-8B's shapes with random weights, 16 rows a step.

    python benchmarks/gpu.py [--layers 32] [--max-tokens 2048] [--contestants ours tutorial trl] [--out FILE]

"ours, fp8" is ours with train.fp8_base. `--max-tokens` is ours, and `--static-rows 1` makes all rows so long.

Never run on a GPU yet: no result lies beside it. `--device cpu --shape tiny` only tries the script itself.
Each contestant runs in a process of its own. tokens/s are those of the rows, without padding, a shared prefix
counted for every row that has it; utilisation is needed FLOPs (4 x body parameters x computed tokens + 4 x
head parameters x labels) over seconds and over the rate of this device's own matrix product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora
from lorasmith.batching.loader import Loader
from lorasmith.config import LoraConfig
from lorasmith.model.fp8 import fp8_base, require_fp8
from lorasmith.model.packed import packed
from lorasmith.testing.texts import random_examples
from lorasmith.training.step import step_gradients, update
from lorasmith.types import IGNORE_INDEX, Batch, Example

SHAPES = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = 16  # of a step
WARM_UP = 4
"""Steps: all different rows once."""
OPTIONS = ("device", "shape", "layers", "steps", "max_tokens", "static_rows")


def main() -> int:
    asked = _arguments()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 0
    if asked.one:
        print(json.dumps(measure(asked)))
        return 0
    report: dict[str, Any] = {"device": asked.device, "torch": torch.__version__, "date": time.strftime("%F")}
    if asked.device == "cuda":
        report["device"] = torch.cuda.get_device_name()
    report["results"] = {name: _in_own_process(name, asked) for name in asked.contestants if _has(name)}
    print(json.dumps(report, indent=1))
    if asked.out:
        Path(asked.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Who trains how fast on one CUDA device.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--static-rows", type=int, choices=(0, 1), default=0)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    return parser.parse_args()


def _has(name: str) -> bool:
    missing = [needed for needed in NEEDS.get(name, ()) if find_spec(needed) is None]
    if missing:
        print(f"{name}: left out, {', '.join(missing)} not installed")
    return not missing


def _in_own_process(name: str, asked: argparse.Namespace) -> Any:
    options = [f"--{key.replace('_', '-')}={getattr(asked, key)}" for key in OPTIONS]
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, *options], stdout=subprocess.PIPE, text=True, check=False
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else "failed"


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """Figures of one contestant in this process."""
    rows = random_examples(500, ROWS * 4, prefix=20, longest=80)
    module = _random_module(asked)
    rate = _product_rate(module)
    body = sum(p.numel() for n, p in module.named_parameters() if "proj" in n)
    head = module.get_output_embeddings().weight.numel()
    computed = [0.0, 0.0]
    if asked.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    seconds = CONTESTANTS[asked.one](module, rows, asked, computed)
    flops = 4 * body * computed[0] + 4 * head * computed[1]
    tokens = sum(len(row) for row in rows) / len(rows) * ROWS
    peak = torch.cuda.max_memory_allocated() if asked.device == "cuda" else 0
    return {
        "tokens_per_second": tokens / seconds,
        "computed_tokens_per_second": computed[0] / seconds,
        "rows_per_second": ROWS / seconds,
        "utilisation": flops / seconds / rate,
        "product_tflops": rate / 1e12,
        "peak_gib": peak / 2**30,
        "seconds_in_all": time.perf_counter() - began,
    }


def _random_module(asked: argparse.Namespace) -> PreTrainedModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if asked.device == "cuda" else torch.float32)
    try:
        with torch.device(asked.device):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[asked.shape], num_hidden_layers=asked.layers))
    finally:
        torch.set_default_dtype(before)


def _product_rate(module: PreTrainedModel) -> float:
    """FLOP/s of the widest product of a layer at 1024 rows, the best of ten."""
    weight = module.get_submodule("model.layers.0.mlp.gate_proj").weight.detach()
    x = torch.randn(1024, weight.shape[1], device=weight.device, dtype=weight.dtype)
    calls = 50 if weight.is_cuda else 1  # one by one their launches would be measured
    best = min(
        _seconds(lambda: [torch.mm(x, weight.T) for _ in range(calls)], weight.device) for _ in range(10)
    )
    return 2.0 * 1024 * weight.numel() * calls / best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(
    module: PreTrainedModel,
    rows: Sequence[Example],
    asked: argparse.Namespace,
    computed: list[float],
    *,
    fp8: bool = False,
) -> float:
    """Seconds of a step; `computed` gets the tokens and labels of one, on the average, without padding."""
    clock = DropoutClock(seed=0)
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=TARGETS)
    if fp8:
        require_fp8(module)
    model = attach_lora(module, config, family_targets=None, base_name="random", clock=clock).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    loader = Loader(
        rows, batch_size=ROWS, max_tokens=asked.max_tokens, seed=0, shuffle=False, share_prefixes=True
    )
    kinds = [loader.step(number) for number in range(len(rows) // ROWS)]
    batches = [batch for step in kinds for batch in step]
    tokens, labels = (sum(map(count, batches)) / len(kinds) for count in (_num_tokens, _num_labels))
    computed[:] = [tokens, labels]
    with packed(model, clock) as packed_module, fp8_base(model, enabled=fp8):
        packed_module.row_length = asked.max_tokens if asked.static_rows else None

        def step(number: int) -> None:
            clock.step = number
            batches = loader.step(number % len(kinds), asked.max_tokens)
            step_gradients(packed_module, parameters, batches, max_grad_norm=1.0)
            update(optimizer, 1e-4)

        for number in range(WARM_UP):
            step(number)
        work = partial(_each, step, range(asked.steps))
        return _seconds(work, packed_module.device) / asked.steps


def _each(step: Callable[[int], None], numbers: Sequence[int]) -> None:
    for number in numbers:
        step(number)


def _num_tokens(batch: Batch) -> int:
    return len(batch.input_ids)


def _num_labels(batch: Batch) -> int:
    return int((batch.labels != IGNORE_INDEX).sum())


def tutorial(
    module: PreTrainedModel, rows: Sequence[Example], asked: argparse.Namespace, computed: list[float]
) -> float:
    """The tutorials' script: Trainer over PEFT, 8 rows x 2, checkpointing, dropout 0.1."""
    module.enable_input_require_grads()
    tokenizer, clock = _tokenizer(), Clock(module.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            **_arguments_of_both(folder, module, asked.steps),
        )
        Trainer(
            model=peft.get_peft_model(module, _lora(0.1)),
            args=arguments,
            train_dataset=_as_transformers(rows, asked.steps),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[clock],
        ).train()
    computed[:] = _plain_work(rows)
    return clock.seconds_of_a_step(asked.steps)


def trl(
    module: PreTrainedModel, rows: Sequence[Example], asked: argparse.Namespace, computed: list[float]
) -> float:
    """TRL's SFTTrainer with packing and Liger's kernels, no checkpointing, dropout 0."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    module.set_attn_implementation("flash_attention_2" if find_spec("flash_attn") else "sdpa")
    tokens, clock = sum(len(row) for row in rows), Clock(module.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            packing=True,
            packing_strategy="bfd",
            max_length=tokens * ROWS // len(rows),
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            use_liger_kernel=True,
            **_arguments_of_both(folder, module, asked.steps),
        )
        SFTTrainer(
            model=module,
            args=arguments,
            train_dataset=Dataset.from_list(_as_transformers(rows, asked.steps)),
            processing_class=_tokenizer(),
            peft_config=_lora(0.0),
            callbacks=[clock],
        ).train()
    computed[:] = _plain_work(rows)
    return clock.seconds_of_a_step(asked.steps)


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        _wait(self.device)
        self.times.append(time.perf_counter())

    def seconds_of_a_step(self, steps: int) -> float:
        return (self.times[-1] - self.times[WARM_UP - 1]) / steps


def _arguments_of_both(folder: str, module: PreTrainedModel, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": WARM_UP + steps,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": module.device.type == "cpu",
    }


def _lora(dropout: float) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS
    )


def _as_transformers(rows: Sequence[Example], steps: int) -> list[dict[str, list[int]]]:
    """Enough for all steps; transformers shifts labels itself."""
    again = (steps + WARM_UP) * ROWS // len(rows) + 1
    told = [
        {
            "input_ids": row.input_ids.tolist(),
            "attention_mask": [1] * len(row),
            "labels": [IGNORE_INDEX, *row.labels[:-1].tolist()],
        }
        for row in rows
    ]
    return told * again


def _plain_work(rows: Sequence[Example]) -> list[float]:
    """Tokens and labels of a step where nothing is shared."""
    steps = len(rows) / ROWS
    return [sum(len(row) for row in rows) / steps, sum(row.num_targets for row in rows) / steps]


def _tokenizer() -> PreTrainedTokenizerFast:
    """What the trainers ask for and nobody writes with: rows are ids already."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


CONTESTANTS = {"ours": ours, "ours, fp8": partial(ours, fp8=True), "tutorial": tutorial, "trl": trl}
NEEDS = {"trl": ("trl", "liger_kernel", "datasets")}

if __name__ == "__main__":
    sys.exit(main())
