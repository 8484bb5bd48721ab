"""Answers per second: our batched decoding against transformers' model.generate on the same prompts.

A random Llama of 160 million parameters in fp32, greedy, without a stop token, so that both do the same
work. Rounds alternate; the ratio is of the fastest rounds, since others may use the machine.

    python benchmarks/generation.py            # writes generation.json beside this file
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from lorasmith.config import GenerateConfig, ModelConfig
from lorasmith.families.base import Family
from lorasmith.infer.decode import decode
from lorasmith.model.model import Model
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.tokenizer import Tokenizer
from lorasmith.types import Ints

VOCAB_SIZE, SHARED_TOKENS, PAD_ID = 32_000, 20, 0


class NoTokenizer(Tokenizer):
    """Prompts are ids already; only the id of padding is asked for."""

    chat_template = None
    vocab_size, special_tokens, eos_id, pad_id = VOCAB_SIZE, {}, None, PAD_ID

    def encode_all(self, texts, *, starts=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    decode = lost = stream = encode_all


class NoFormat(ChatFormat):
    """Nothing ends an answer."""

    def pieces(self, messages, *, for_generation=False):  # type: ignore[no-untyped-def]
        raise NotImplementedError


@dataclass(frozen=True)
class Case:
    name: str
    batch_size: int
    shared: bool
    equal_lengths: bool
    adapter: bool


CASES = (
    Case("prompts of different lengths", 32, False, False, False),
    Case("prompts of one length", 32, False, True, False),
    Case("shared system prompt", 32, True, False, False),
    Case("different lengths, adapter", 32, False, False, True),
    Case("shared system prompt, adapter", 32, True, False, True),
    Case("batch of 16, adapter", 16, False, False, True),
    Case("one prompt", 1, False, True, False),
    Case("one prompt, adapter", 1, False, True, True),
)


@dataclass(frozen=True)
class Measured:
    case: str
    seconds_transformers: float
    seconds_ours: float
    ratio: float
    ratio_of_medians: float
    same_tokens: float


def make_module(adapter: bool) -> transformers.PreTrainedModel | peft.PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_ID,
    )
    module = LlamaForCausalLM(config).eval()
    if not adapter:
        return module
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(module, lora).eval()


def make_model(module: transformers.PreTrainedModel | peft.PeftModel) -> Model:
    tokenizer = NoTokenizer()
    written = NoFormat("official", tokenizer, [])
    family = Family("ids", "Ids", lambda _: True, {"official": lambda _: written}, None, None, "nothing")
    return Model(module, tokenizer, family, written, Path("ids"), ModelConfig(path="ids"))


def make_prompts(case: Case) -> list[Ints]:
    generator = np.random.default_rng(1)
    start = generator.integers(3, VOCAB_SIZE, SHARED_TOKENS)
    prompts = []
    for _ in range(case.batch_size):
        length = 24 if case.equal_lengths else int(generator.integers(8, 40))
        own = generator.integers(3, VOCAB_SIZE, length)
        prompts.append(np.concatenate([start if case.shared else own[:0], own]))
    return sorted(prompts, key=len, reverse=True)


def by_transformers(model: Model, prompts: Sequence[Ints], new_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=PAD_ID)
    rows = model.module.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return rows[:, longest:].tolist()


def by_us(model: Model, prompts: Sequence[Ints], new_tokens: int) -> list[list[int]]:
    answers = decode(model, prompts, GenerateConfig(greedy=True, max_new_tokens=new_tokens))
    return [answer.ids for answer in answers]


def measure(case: Case, model: Model, rounds: int, new_tokens: int, clock: Callable[[], float]) -> Measured:
    prompts = make_prompts(case)
    ways: tuple[Callable[[Model, Sequence[Ints], int], list[list[int]]], ...] = (by_transformers, by_us)
    seconds: tuple[list[float], ...] = ([], [])
    for way in ways:
        way(model, prompts, 2)
    for turn in range(rounds):
        answers = {}
        for index in (0, 1) if turn % 2 else (1, 0):
            begin = clock()
            answers[index] = ways[index](model, prompts, new_tokens)
            seconds[index].append(clock() - begin)
    theirs, ours = (min(times) for times in seconds)
    medians = [statistics.median(times) for times in seconds]
    same = np.mean(np.array(answers[0]) == np.array(answers[1]))
    return Measured(case.name, theirs, ours, theirs / ours, medians[0] / medians[1], float(same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=64)
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    parser.add_argument("--clock", choices=clocks, default="wall", help="cpu: where others use the machine")
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    models = {adapter: make_model(make_module(adapter)) for adapter in (False, True)}
    print(f"{'case':<32}{'transformers':>14}{'ours':>9}{'ratio':>8}{'same ids':>10}")
    results = []
    for case in (CASES[index] for index in asked.cases):
        one = measure(case, models[case.adapter], asked.rounds, asked.new_tokens, clocks[asked.clock])
        times = f"{one.seconds_transformers:>12.2f} s{one.seconds_ours:>7.2f} s"
        print(f"{case.name:<32}{times}{one.ratio:>8.2f}{one.same_tokens:>10.1%}", flush=True)
        results.append(asdict(one))
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    told = {"date": date.today().isoformat(), "machine": machine, "clock": asked.clock}
    told |= {"rounds": asked.rounds, "new_tokens": asked.new_tokens, "results": results}
    asked.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
