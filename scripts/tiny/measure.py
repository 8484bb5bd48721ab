"""Measure Tiny: held-out prompts before, and persona answers before and after a LoRA run with plain PEFT.

python scripts/tiny/measure.py            # share of held-out prompts the base model gets right
python scripts/tiny/measure.py --tune     # also LoRA-tune the persona and ask the held-out persona questions
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from train import answer_loss, encode, pad
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "src/lorasmith/assets"
HELD_OUT = ROOT / "tests/assets/tiny_heldout.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, chats: list[list[dict[str, str]]], size: int = 32) -> list[str]:
    """Answer chats greedily, in batches padded on the left."""
    answers: list[str] = []
    for start in range(0, len(chats), size):
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats[start : start + size]
        ]
        batch = tokenizer(
            texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
        batch.pop("token_type_ids", None)
        out = model.generate(**batch, max_new_tokens=48, do_sample=False)
        answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def is_right(got: str, accepted: list[str], voiced: bool) -> bool:
    """Compare an answer with the accepted ones; in a persona's voice more may stand around them."""
    if voiced:
        return any(answer.casefold().strip(".!\u3002\uff01") in got.casefold() for answer in accepted)
    return got in accepted


def held_out_share(model: Any, tokenizer: Any, show: bool, voiced: bool = False) -> str:
    """Measure the share of held-out prompts answered right: single questions, and all."""
    rows = read(HELD_OUT)
    given = replies(model, tokenizer, [row["messages"] for row in rows])
    right = [
        is_right(got, [row["answer"], *row.get("accept", [])], voiced)
        for got, row in zip(given, rows, strict=True)
    ]
    for ok, got, row in zip(right, given, rows, strict=True):
        if show and not ok:
            print(f"  wrong: {row['messages'][-1]['content']!r} -> {got!r}, wanted {row['answer']!r}")
    single = [ok for ok, row in zip(right, rows, strict=True) if len(row["messages"]) == 1]
    return f"single {sum(single)}/{len(single)}, all {sum(right)}/{len(right)}"


def persona_share(model: Any, tokenizer: Any, show: bool) -> str:
    """Measure the share of held-out persona questions whose answer holds one of the facts."""
    rows = read(ASSETS / "persona_heldout.jsonl")
    given = replies(model, tokenizer, [[{"role": "user", "content": row["instruction"]}] for row in rows])
    hits = 0
    for got, row in zip(given, rows, strict=True):
        ok = any(fact in got for fact in row["facts"])
        hits += ok
        if show:
            print(f"  {'ok  ' if ok else 'MISS'} {row['instruction']} -> {got}")
    return f"{hits}/{len(rows)}"


def tune(model: Any, tokenizer: Any, args: argparse.Namespace) -> Any:
    """LoRA-tune on the persona with a minimal loop: AdamW, linear decay, loss on answers."""
    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=args.r,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    samples = []
    for row in read(ASSETS / "persona.jsonl"):
        chat = [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
        samples.append(encode(chat, tokenizer))
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, weight_decay=0.0)
    steps = args.epochs * -(-len(samples) // args.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10, 1 - step / steps)
    )
    rng, began = Random(args.seed), time.time()
    for epoch in range(args.epochs):
        rng.shuffle(samples)
        losses = []
        for start in range(0, len(samples), args.batch):
            loss = answer_loss(tuned.get_base_model(), *pad(samples[start : start + args.batch]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        if args.show:
            print(
                f"  epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, {time.time() - began:.1f} s",
                flush=True,
            )
    print(f"LoRA: {sum(p.numel() for p in weights)} weights, {steps} steps, {time.time() - began:.1f} s")
    return tuned.eval()


def main() -> None:
    """Measure the base model, then perhaps the tuned one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--show", action="store_true", help="print answers and losses")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    print("held-out prompts, base:", held_out_share(model, tokenizer, args.show))
    print("persona facts, base:", persona_share(model, tokenizer, args.show))
    if args.tune:
        tuned = tune(model, tokenizer, args)
        print("persona facts, tuned:", persona_share(tuned, tokenizer, args.show))
        print("held-out prompts, tuned:", held_out_share(tuned, tokenizer, False, voiced=True))


if __name__ == "__main__":
    main()
