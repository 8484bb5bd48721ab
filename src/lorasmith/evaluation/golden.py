"""golden.json: what an adapter said when its training ended, for `replay` to ask again wherever it went.

Logits are computed in fp32 over the weights as they are stored, so that they move with the weights and the
ids, and hardly with the machine. Shapes: V = vocabulary, K = logits that are kept, T = tokens of a prompt,
B = prompts.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

from lorasmith.errors import DataError, SetupError
from lorasmith.exporting.proof import logits_of
from lorasmith.files.adapter_dir import GOLDEN_FILE
from lorasmith.files.model_dir import read_json
from lorasmith.infer.continuation import Continuation
from lorasmith.infer.decode import PASS_COST, context_length, stop_ids
from lorasmith.infer.generate import with_system
from lorasmith.model.dtype import DTYPE_NAMES
from lorasmith.model.load import module_dtype
from lorasmith.model.model import Model
from lorasmith.model.packed import base_module
from lorasmith.storage import Storage
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Message

FORMAT = 1
SENTENCES = ("Who are you, and what can you do?", "你是谁？请用一句话介绍你自己。")
KEPT_LOGITS = 8
ANSWER_TOKENS = 16
LONGEST_PROMPT = 512  # tokens; a longer one proves no more and costs T x V logits
MOST_TRIED = 64  # rows looked at for prompts that are short enough
LIBRARIES = ("lorasmith", "torch", "transformers", "peft", "tokenizers")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt and what was said to it."""

    messages: tuple[Mapping[str, str], ...]
    input_ids: tuple[int, ...]
    top_ids: tuple[int, ...]
    """The K likeliest first tokens, the likeliest first."""
    top_logits: tuple[float, ...]
    base_logits: tuple[float, ...]
    """Of the same tokens without the adapter: the difference is what the adapter does."""
    answer_ids: tuple[int, ...]
    """Greedy, at most ANSWER_TOKENS of them, a stop id included."""
    answer: str


@dataclass(frozen=True)
class Golden:
    """The content of golden.json."""

    prompts: tuple[GoldenPrompt, ...]
    family: str
    chat_format: str
    base: str
    """`base_fingerprint` of the model that was trained on."""
    tokenizer: Mapping[str, str]
    """`tokenizer_fingerprint`."""
    dtype: str
    device: str
    versions: Mapping[str, str]


def keep_golden(
    model: Model,
    conversations: Sequence[Conversation],
    rows: int,
    base: str,
    storage: Storage,
    run_dir: Path,
) -> None:
    """Write golden.json into a finished run. The run stands whatever happens here: a failure is a warning."""
    try:
        tree = {"format": FORMAT, **asdict(record(model, conversations, rows, base))}
        text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        storage.replace(run_dir / GOLDEN_FILE, text.encode())
    except Exception as error:  # a finished run must not be lost to what only watches over it
        reason = str(error).partition("\n")[0] or type(error).__name__
        warnings.warn(f"the run is whole, but {GOLDEN_FILE} could not be written: {reason}", stacklevel=2)


def record(model: Model, conversations: Sequence[Conversation], rows: int, base: str) -> Golden:
    """What `model` says now to the first `rows` prompts of `conversations` that fit, and to two sentences.

    Raises: DataError if its chat format can write none of them.
    """
    neutral = [with_system(Conversation((Message("user", s),), "neutral"), model.system) for s in SENTENCES]
    own = map(_prompt_of, conversations[:MOST_TRIED])
    chosen = [*islice(_encoded(model, own), rows), *_encoded(model, neutral)]
    if not chosen:
        raise DataError("no prompt can be written in this chat format")
    answers = greedy_ids(model.module, [ids for _, ids in chosen], ANSWER_TOKENS)
    golden = tuple(_asked(model, *one, said) for one, said in zip(chosen, answers, strict=True))
    return Golden(
        prompts=golden,
        family=model.family.name,
        chat_format=model.chat_format.name,
        base=base,
        tokenizer=tokenizer_fingerprint(model.directory),
        dtype=DTYPE_NAMES[module_dtype(base_module(model.module))],
        device=base_module(model.module).device.type,
        versions=installed_versions(),
    )


def read_golden(directory: Path) -> Golden:
    """Raises: SetupError if there is none, or it is damaged or of another version."""
    path = directory / GOLDEN_FILE
    if not path.exists():
        raise SetupError(
            f"there is no {GOLDEN_FILE}: nothing is known to hold this against",
            where=str(directory),
            why="it is written when a training ends, and goes along with `merge` and `convert`",
            fix="verify the run itself, or train it to its end (lorasmith train --resume)",
        )
    tree = read_json(path)
    try:
        if tree.pop("format") != FORMAT:
            raise ValueError("it was written by another version of lorasmith")
        prompts = tuple(_read_prompt(prompt) for prompt in tree.pop("prompts"))
        if not prompts:
            raise ValueError("there are no prompts in it")
        return Golden(prompts=prompts, **tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SetupError(
            f"{GOLDEN_FILE} cannot be read", where=str(path), why=f"{type(error).__name__}: {error}"
        ) from None


def prompt_ids(chat_format: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """Raises: DataError if the format cannot write them."""
    talk = Conversation(tuple(messages), "golden")
    ids: list[int] = chat_format.encode(talk, for_generation=True).input_ids.tolist()
    return ids


def first_logits(module: nn.Module, ids: Sequence[int]) -> Tensor:
    """Logits (V,) behind a prompt, in fp32, on the CPU."""
    device = next(module.parameters()).device
    return logits_of(module, [torch.tensor(ids, device=device)])[0][-1].cpu()


@torch.no_grad()
def greedy_ids(module: nn.Module, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The likeliest `count` tokens behind each prompt, in the module's own dtype, whatever ends an answer.

    Prompts and `count` together may not go beyond the model's context.
    """
    base = base_module(module)
    rows = Continuation(base, [np.array(ids) for ids in prompts], 0, None)
    ids_B = rows.start(PASS_COST).argmax(-1)
    said = [ids_B]
    for _ in range(count - 1):
        ids_B = rows.step(ids_B).argmax(-1)
        said.append(ids_B)
    answers: list[list[int]] = torch.stack(said, dim=1).tolist()
    return answers


@torch.no_grad()
def base_fingerprint(module: nn.Module) -> str:
    """sha256 of the names, shapes and first values of a module that has no adapter yet.

    Values are rounded to bf16 first: a base loaded in another dtype is the same base.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        head = parameter.detach().flatten()[:16].to(torch.bfloat16).float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + head)
    return digest.hexdigest()


def tokenizer_fingerprint(directory: Path) -> dict[str, str]:
    """sha256 of each file that a tokenizer is made of, by name."""
    there = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in there}


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES if _is_installed(name)}


def _is_installed(name: str) -> bool:
    """A checkout on the path has no metadata of its own."""
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True


def _prompt_of(conversation: Conversation) -> Conversation:
    """Without its last answer."""
    last = max(n for n, message in enumerate(conversation.messages) if message.role == "assistant")
    return Conversation(conversation.messages[:last], conversation.origin)


def _encoded(model: Model, prompts: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[int]]]:
    ids_of = ((prompt, _ids_of(model, prompt)) for prompt in prompts)
    return ((prompt, ids) for prompt, ids in ids_of if ids is not None)


def _ids_of(model: Model, prompt: Conversation) -> list[int] | None:
    """None for a prompt that this model has no room or no words for."""
    try:
        ids = prompt_ids(model.chat_format, prompt.messages)
    except DataError:
        return None
    limit = context_length(model)
    room = LONGEST_PROMPT if limit is None else min(LONGEST_PROMPT, limit - ANSWER_TOKENS)
    return ids if len(ids) <= room else None


def _asked(model: Model, prompt: Conversation, ids: list[int], said: list[int]) -> GoldenPrompt:
    module = model.module
    logits_V = first_logits(module, ids)
    with module.disable_adapter() if isinstance(module, peft.PeftModel) else nullcontext():
        base_V = first_logits(module, ids)
    top_K = logits_V.topk(min(KEPT_LOGITS, len(logits_V))).indices
    stops = stop_ids(model)
    end = next((n for n, token_id in enumerate(said, start=1) if token_id in stops), len(said))
    return GoldenPrompt(
        messages=tuple({"role": m.role, "content": m.content} for m in prompt.messages),
        input_ids=tuple(ids),
        top_ids=tuple(top_K.tolist()),
        top_logits=tuple(logits_V[top_K].tolist()),
        base_logits=tuple(base_V[top_K].tolist()),
        answer_ids=tuple(said[:end]),
        answer=model.tokenizer.decode(said[:end]),
    )


def _read_prompt(tree: Mapping[str, Any]) -> GoldenPrompt:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in tree.items()}
    prompt = GoldenPrompt(**fields)
    sizes = {len(prompt.top_ids), len(prompt.top_logits), len(prompt.base_logits)}
    if len(sizes) > 1 or not prompt.input_ids or not prompt.answer_ids:
        raise ValueError("a prompt in it is not whole")
    return prompt
