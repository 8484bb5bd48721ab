"""Train Tiny, the built-in base model: a byte-level BPE tokenizer and a small Llama, from scratch on the CPU.

    python scripts/tiny/train.py --out src/lorasmith/assets/tiny --minutes 25

The corpus comes from ``corpus.py``; nothing is downloaded. Training takes the minutes that are asked for: the
schedule follows the clock.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import torch
from corpus import dialogues
from muon import Muon
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ECHO_CUES = ("Repeat after me: ", "Please repeat: ", "Say this: ", "跟我说：", "请重复：", "请跟我读：")
SPECIALS = ["<|pad|>", "<|start|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, START, END, ASSISTANT = 0, 1, 2, 5
CONTEXT = 512
VOCABULARY = 3584
TEMPLATE = """{{- '<|start|>' -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('Tiny knows the roles system, user and assistant only, not ' + message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

Sample = tuple[list[int], list[bool]]


def train_tokenizer(count: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with single digits on sample dialogues."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=12,
        show_progress=False,
    )
    texts = (message["content"] for messages in islice(dialogues(seed), count) for message in messages)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIALS[3:],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def new_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Build the untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> Sample:
    """Turn a dialogue into tokens, and mark the tokens of the answers (with their end token)."""
    tokens, marks = [START], [False]
    for message in messages:
        body = [*tokenizer.encode(message["content"], add_special_tokens=False), END]
        answer = message["role"] == "assistant"
        tokens += [SPECIALS.index(f"<|{message['role']}|>"), *body]
        marks += [False] + [answer] * len(body)
    return tokens, marks


def echo(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Sample:
    """Ask to repeat loose tokens, a few times: that teaches a small model to copy from its context."""
    tokens, marks = [START], [False]
    for _ in range(rng.randint(1, 3)):
        cue = tokenizer.encode(rng.choice(ECHO_CUES), add_special_tokens=False)
        body = [*rng.choices(range(len(SPECIALS), len(tokenizer)), k=rng.randint(3, 16)), END]
        tokens += [SPECIALS.index("<|user|>"), *cue, *body, ASSISTANT, *body]
        marks += [False] * (len(cue) + len(body) + 2) + [True] * len(body)
    return tokens, marks


def echo_share(done: float) -> float:
    """Return the share of echo batches: many at first, none in the last part of the training."""
    return 0.5 if done < 0.25 else 0.15 if done < 0.6 else 0.0


def batches(
    tokenizer: PreTrainedTokenizerFast, size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield padded batches of about ``size`` tokens, dialogues of like length together."""
    stream = dialogues(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        pool = sorted(
            (encode(next(stream), tokenizer) for _ in range(3000)), key=lambda sample: len(sample[0])
        )
        groups: list[list[Sample]] = [[]]
        for sample in pool:
            if len(sample[0]) > CONTEXT:
                continue
            if (len(groups[-1]) + 1) * len(sample[0]) > size:
                groups.append([])
            groups[-1].append(sample)
        for index in torch.randperm(len(groups), generator=generator).tolist():
            yield pad(groups[index])


def pad(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad samples on the right to one length."""
    longest = max(len(tokens) for tokens, _ in samples)
    tokens = torch.full((len(samples), longest), PAD)
    marks = torch.zeros((len(samples), longest), dtype=torch.bool)
    for row, (ids, answer) in enumerate(samples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        marks[row, : len(ids)] = torch.tensor(answer)
    return tokens, marks


def answer_loss(model: LlamaForCausalLM, tokens: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Mean loss over the tokens of the answers; the other positions are never projected to the vocabulary."""
    hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state
    wanted = marks[:, 1:]
    return cross_entropy(model.lm_head(hidden[wanted]), tokens[:, 1:][wanted])


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=rate * 6, decay=0.05),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def scale(done: float, step: int) -> float:
    """Learning-rate factor: short warm-up, flat, then linear down to nothing."""
    return min(1.0, (step + 1) / 60, max(0.0, (1.0 - done) / 0.55))


def fit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Train until the minutes are over."""
    chosen = optimizers(model, args.rate)
    bases = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    began, running, seen = time.time(), 0.0, 0
    rng = Random(args.seed)
    for step, (tokens, marks) in enumerate(batches(tokenizer, args.batch_tokens, args.seed + 1)):
        done = (time.time() - began) / (60 * args.minutes)
        if done >= 1:
            break
        groups = [group for optimizer in chosen for group in optimizer.param_groups]
        for group, base in zip(groups, bases, strict=True):
            group["lr"] = base * scale(done, step)
        if rng.random() < args.echo * echo_share(done):
            tokens, marks = pad([echo(tokenizer, rng) for _ in range(args.batch_tokens // 50)])
        loss = answer_loss(model, tokens, marks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        seen += tokens.numel()
        if step % 50 == 0:
            print(
                f"{time.time() - began:.0f} s  step {step}  loss {running:.4f}  {seen / 1e6:.2f} M tokens",
                flush=True,
            )
        if args.save_every and step and step % args.save_every == 0:
            save(model, tokenizer, args.out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model, tokenizer, template and generation settings in the Hugging Face layout."""
    out.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.tie_weights()
    half.generation_config = GenerationConfig(
        bos_token_id=START, eos_token_id=[END], pad_token_id=PAD, do_sample=False, max_new_tokens=64
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settle_tokenizer_config(out / "tokenizer_config.json")


def settle_tokenizer_config(path: Path) -> None:
    """Name the tokenizer class and the role tokens as every transformers release reads them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("backend", "extra_special_tokens", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = SPECIALS[3:]
    config["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--save-every", type=int, default=0, help="also save every so many steps")
    parser.add_argument("--echo", type=float, default=1.0, help="factor on the share of echo batches")
    parser.add_argument("--start", type=Path, help="go on from this model instead of a new one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(40_000, args.seed)
        model = new_model(len(tokenizer), args.seed)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}")
    model.train()
    fit(model, tokenizer, args)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
