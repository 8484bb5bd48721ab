"""A conversation with a model, as it is written: streaming, history, and base beside adapter."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event

import peft

from lorasmith.config import GenerateConfig
from lorasmith.errors import ConfigError
from lorasmith.infer.decode import Decoded, decode, stop_ids
from lorasmith.infer.generate import completion, generate, require_room, with_system
from lorasmith.model.model import Model
from lorasmith.text.template import ChatFormat
from lorasmith.types import Completion, Conversation, Example, Message


class ChatSession:
    """One conversation. `system` None: what the model was tuned with; "": no system message at all."""

    def __init__(self, model: Model, config: GenerateConfig, system: str | None = None) -> None:
        self.model, self.config = model, config
        self.system = model.system if system is None else system
        self.history: list[Message] = []
        """User and assistant in turn, without the system message."""
        self.last: Completion | None = None
        """The last answer."""

    def stream(self, text: str) -> Generator[str, None, None]:
        """The answer to `text` while it is written, in whole characters; joined it is `last.content`.

        Closing the iterator (or Ctrl-C) stops at the next token, and what was shown stays in the history
        as the answer. After an error, or when nothing was shown, the history is as before.

        Raises: DataError when the conversation no longer fits; any error of the generating thread.
        """
        user = Message("user", text)
        prompt = self._encode(user)
        taken: list[int] = []
        shown: list[str] = []
        try:
            with _generating(self.model, prompt, self.config) as (ids, running):
                for piece in readable(self.model.chat_format, self._until_stop(ids, taken)):
                    shown.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if shown:
                self._remember(user, Completion("".join(shown), "length", len(prompt), len(taken)))
            raise
        self._remember(user, completion(self.model, prompt, running.result()[0]))

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.history.clear()
        self.last = None

    def _encode(self, user: Message) -> Example:
        conversation = with_system(Conversation((*self.history, user), "chat"), self.system)
        prompt = self.model.chat_format.encode(conversation, for_generation=True)
        require_room(self.model, prompt)
        return prompt

    def _until_stop(self, ids: Iterable[int], taken: list[int]) -> Iterator[int]:
        stops = stop_ids(self.model)
        for token_id in ids:
            taken.append(token_id)
            if token_id in stops:
                return
            yield token_id

    def _remember(self, user: Message, answer: Completion) -> None:
        self.last = answer
        self.history += [user, Message("assistant", answer.content)]


def chat(model: Model, messages: Sequence[Message], config: GenerateConfig) -> Completion:
    """One answer. Raises: DataError as `generate` does."""
    return generate(model, [messages], config)[0]


def compare(
    model: Model, messages: Sequence[Message], config: GenerateConfig
) -> tuple[Completion, Completion]:
    """The answer of the base model and that of the adapter. Raises: ConfigError without an adapter."""
    with without_adapter(model):
        base = chat(model, messages, config)
    return base, chat(model, messages, config)


@contextmanager
def without_adapter(model: Model) -> Iterator[None]:
    """Within: `model` answers as its base does. Raises: ConfigError if it has no adapter."""
    if not isinstance(model.module, peft.PeftModel):
        raise ConfigError(
            "there is no adapter to switch off",
            where=str(model.directory),
            why="this is a base model alone",
            fix="name a run directory, or add --adapter DIR",
        )
    with model.module.disable_adapter():
        yield


def readable(chat_format: ChatFormat, ids: Iterator[int]) -> Iterator[str]:
    """What `chat_format.read_answer` makes of the ids so far, as it grows."""
    text = shown = ""
    for piece in chat_format.tokenizer.stream(ids):
        text += piece
        answer = chat_format.read_answer(text)
        if len(answer) > len(shown) and answer.startswith(shown):
            yield answer[len(shown) :]
            shown = answer


@contextmanager
def _generating(
    model: Model, prompt: Example, config: GenerateConfig
) -> Iterator[tuple[Iterator[int], Future[list[Decoded]]]]:
    """New ids as a thread makes them; leaving stops the thread at the next token and waits for it."""
    tokens: SimpleQueue[int | None] = SimpleQueue()
    interrupt = Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate") as pool:
        running = pool.submit(
            decode,
            model,
            [prompt.input_ids],
            config,
            on_token=tokens.put,
            interrupted=interrupt.is_set,
        )
        running.add_done_callback(lambda _: tokens.put(None))
        try:
            yield iter(tokens.get, None), running
        finally:
            interrupt.set()
