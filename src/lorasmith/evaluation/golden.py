"""golden.json: what an adapter said when its training ended, for `replay` to ask again wherever it went.

Logits are computed in fp32 over the weights as they are stored, so that they move with the weights and the
ids, and hardly with the machine. Shapes: V = vocabulary, K = logits that are kept, T = tokens of a prompt,
B = prompts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.errors import SetupError
from lorasmith.exporting.proof import logits_of
from lorasmith.files.adapter_dir import GOLDEN_FILE
from lorasmith.infer.continuation import Continuation
from lorasmith.infer.decode import PASS_COST
from lorasmith.json_file import as_record, read_object
from lorasmith.model.dtype import DTYPES
from lorasmith.model.packed import base_module
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Message, Role

FORMAT = 1
KEPT_LOGITS = 8
ANSWER_TOKENS = 16
LONGEST_PROMPT = 512  # tokens; a longer one proves no more and costs T x V logits
_LARGEST_FILE = 2**24
_MOST_PROMPTS = 10_000
_LARGEST_ID = 2**31
LIBRARIES = ("lorasmith", "torch", "transformers", "peft", "tokenizers")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt and what was said to it."""

    messages: tuple[Mapping[str, str], ...]
    """Empty for a prompt of ids: the beginning of a training example, or ids drawn by chance."""
    input_ids: tuple[int, ...]
    top_ids: tuple[int, ...]
    """The K likeliest first tokens, the likeliest first."""
    top_logits: tuple[float, ...]
    base_logits: tuple[float, ...]
    """Of the same tokens without the adapter: the difference is what the adapter does."""
    answer_ids: tuple[int, ...]
    """Greedy, at most ANSWER_TOKENS of them, a stop id included."""
    answer: str
    """Without a tokenizer: the ids as text."""


@dataclass(frozen=True)
class Golden:
    """The content of golden.json."""

    prompts: tuple[GoldenPrompt, ...]
    family: str
    """"auto" for a bare module, whose family nobody said."""
    chat_format: str | None
    """None for a bare module, which was trained on ids alone."""
    base: str
    """`base_fingerprint` of the model that was trained on."""
    tokenizer: Mapping[str, str]
    """`tokenizer_fingerprint`."""
    dtype: str
    device: str
    versions: Mapping[str, str]


def read_golden(directory: Path) -> Golden:
    """Raises: SetupError if there is none, or it is damaged or of another version."""
    path = directory / GOLDEN_FILE
    if not path.exists():
        raise SetupError(
            f"there is no {GOLDEN_FILE}: nothing is known to hold this against",
            where=str(directory),
            why="it is written when a training ends, and goes along with `merge` and `convert`",
            fix="verify the run itself, or train it to its end (lorasmith train --resume), "
            "which writes it anew where it is missing",
        )
    try:
        tree = read_object(path, most_bytes=_LARGEST_FILE, strict=True)
        if tree.pop("format", None) != FORMAT:
            raise ValueError("it was written by another version of lorasmith")
        golden = as_record(Golden, tree)
        if not 0 < len(golden.prompts) <= _MOST_PROMPTS or golden.dtype not in DTYPES:
            raise ValueError("there are no prompts in it, too many, or no dtype that is known")
        for prompt in golden.prompts:
            _require_whole(prompt)
    except (OSError, ValueError) as error:
        fix = "`lorasmith train --resume` of the finished run writes it anew; elsewhere, copy it again"
        raise SetupError(f"{GOLDEN_FILE} cannot be read", where=str(path), why=str(error), fix=fix) from None
    return golden


def is_golden(directory: Path) -> bool:
    """Whether `read_golden` can read it."""
    try:
        read_golden(directory)
    except SetupError:
        return False
    return True


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


def _require_whole(prompt: GoldenPrompt) -> None:
    """Raises: ValueError for what `record` never writes."""
    numbers = (*prompt.top_logits, *prompt.base_logits)
    ids = (*prompt.input_ids, *prompt.top_ids, *prompt.answer_ids)
    is_whole = (
        0 < len(prompt.top_ids) == len(prompt.top_logits) == len(prompt.base_logits) <= KEPT_LOGITS
        and 0 < len(prompt.input_ids) <= LONGEST_PROMPT
        and 0 < len(prompt.answer_ids) <= ANSWER_TOKENS
        and all(math.isfinite(number) for number in numbers)
        and all(0 <= token_id < _LARGEST_ID for token_id in ids)
        and all(m.keys() == {"role", "content"} and m["role"] in get_args(Role) for m in prompt.messages)
    )
    if not is_whole:
        raise ValueError("a prompt in it is not whole")
