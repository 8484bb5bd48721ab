"""Conversations -> answers, in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias, TypeVar

from lorasmith.config import GenerateConfig
from lorasmith.errors import DataError
from lorasmith.infer.decode import Decoded, context_length, decode
from lorasmith.infer.sampling import occurrences
from lorasmith.model.model import Model
from lorasmith.types import Completion, Conversation, Example, Message

Prompt: TypeAlias = Conversation | Sequence[Message]
T = TypeVar("T")


def generate(
    model: Model, conversations: Sequence[Prompt], config: GenerateConfig, *, batch_size: int = 8
) -> list[Completion]:
    """The answer to each conversation, in the order given; a Conversation's origin is named by errors.

    A conversation without a system message gets `model.system`. Where prompt and answer fill the model's
    context before max_new_tokens, the answer ends there with finish_reason "length". Prompts of like length
    go together. With `config.seed` the same prompt gets the same answer, in any batch; asked again in the
    same call it gets another.

    Raises: DataError for a prompt that leaves no room for an answer, or that cannot be encoded.
    """
    prompts = encode_prompts(model, conversations)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    batches = list(in_batches(order, batch_size))
    answers = answer_batches(model, ([prompts[row] for row in rows] for rows in batches), config)
    completions = {
        row: one
        for rows, batch in zip(batches, answers, strict=True)
        for row, one in zip(rows, batch, strict=True)
    }
    return [completions[row] for row in range(len(prompts))]


def answer_batches(
    model: Model, batches: Iterable[Sequence[Example]], config: GenerateConfig
) -> Iterator[list[Completion]]:
    """Answers batch by batch, each as soon as it is there; prompts come from `encode_prompts`."""
    seen: Counter[bytes] = Counter()
    for batch in batches:
        prompts = [prompt.input_ids for prompt in batch]
        decoded = decode(model, prompts, config, repeats=occurrences(prompts, seen))
        yield [completion(model, prompt, answer) for prompt, answer in zip(batch, decoded, strict=True)]


def encode_prompts(model: Model, conversations: Sequence[Prompt]) -> list[Example]:
    """Conversations as ids up to where the answer begins. Raises: DataError as `generate` does."""
    complete = [
        with_system(_conversation(prompt, row), model.system)
        for row, prompt in enumerate(conversations, start=1)
    ]
    prompts = model.chat_format.encode_all(complete, for_generation=True)
    for prompt in prompts:
        require_room(model, prompt)
    return prompts


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation opened by `system`, unless it has a system message or there is nothing to say."""
    if not system or any(message.role == "system" for message in conversation.messages):
        return conversation
    return Conversation((Message("system", system), *conversation.messages), conversation.origin)


def require_room(model: Model, prompt: Example) -> None:
    """Raises: DataError if not one token of an answer fits behind the prompt."""
    limit = context_length(model)
    if limit is not None and len(prompt) >= limit:
        raise DataError(
            f"the prompt has {len(prompt)} tokens and leaves no room for an answer",
            where=prompt.origin,
            why=f"this model's context holds {limit} tokens, prompt and answer together",
            fix="shorten the prompt or the history (in a chat, /reset starts afresh)",
        )


def completion(model: Model, prompt: Example, answer: Decoded) -> Completion:
    text = model.chat_format.read_answer(model.tokenizer.decode(answer.ids))
    return Completion(text, answer.finish_reason, len(prompt), answer.num_tokens)


def in_batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _conversation(prompt: Prompt, row: int) -> Conversation:
    return prompt if isinstance(prompt, Conversation) else Conversation(tuple(prompt), f"conversation {row}")
