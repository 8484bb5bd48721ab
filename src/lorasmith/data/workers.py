"""Several tokeniser processes: chunks of conversations out, chunks of flat rows back, in order.

Not `multiprocessing`: fork copies locks that threads of torch or tokenizers hold, and spawn and forkserver
run the user's own script again in every child. A worker here is this file as a program with two pipes;
it ends when its parent does, however that ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, TypeAlias

from lorasmith.data.encode import EncodedChunk, encode_chunk
from lorasmith.text.template import ChatFormat
from lorasmith.types import Conversation, Message

Chunk: TypeAlias = Sequence[Conversation]
Encoded: TypeAlias = tuple[Chunk, EncodedChunk]
WORTH_IT = 20_000
"""Rows from which processes pay: one starts, and reads a tokenizer, in the time of some thousand rows."""
_MOST_WORKERS = 8
_LENGTH = struct.Struct("<Q")


def encode_chunks(
    chunks: Iterable[Chunk], chat_format: ChatFormat, *, workers: int | None = None, worth_it: int = WORTH_IT
) -> Generator[Encoded, None, None]:
    """Each chunk with what became of it, in order, whatever the number of workers.

    `workers`: None is one for each core that this process may use, up to 8; they start at row `worth_it`.
    """
    count = min(_MOST_WORKERS, _cores()) if workers is None else workers
    rest = iter(chunks)
    seen = 0
    for chunk in rest:
        yield chunk, encode_chunk(chunk, chat_format)
        seen += len(chunk)
        if count > 1 and seen >= worth_it:
            break
    definition = _sendable(chat_format)
    if definition is None:
        yield from ((chunk, encode_chunk(chunk, chat_format)) for chunk in rest)
        return
    first = next(rest, None)
    if first is not None:
        yield from _spread(_before(first, rest), chat_format, definition, count)


def _before(first: Chunk, rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield first
    yield from rest


def _spread(
    chunks: Iterator[Chunk], chat_format: ChatFormat, definition: bytes, count: int
) -> Iterator[Encoded]:
    """Twice as many chunks as workers are on their way, so that memory stays flat and no worker waits."""
    workers = [_Worker(definition) for _ in range(count)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)
    pending: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
    threads = ThreadPoolExecutor(count)
    try:
        for chunk in chunks:
            pending.append((chunk, threads.submit(_encode_elsewhere, idle, chunk, chat_format)))
            if len(pending) >= 2 * count:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    finally:  # also when the reader of this generator gives up: Ctrl-C, an error
        for worker in workers:
            worker.stop()
        threads.shutdown(cancel_futures=True)


def _encode_elsewhere(
    idle: queue.SimpleQueue[_Worker], chunk: Chunk, chat_format: ChatFormat
) -> EncodedChunk:
    worker = idle.get()
    try:
        return worker.encode(chunk)
    except (
        OSError,
        EOFError,
    ) as error:  # it was killed, by want of memory most likely: the rows are not lost
        if worker.stopped:
            raise
        warnings.warn(f"a tokeniser process ended ({error}); its rows are encoded here", stacklevel=2)
        return encode_chunk(chunk, chat_format)
    finally:
        idle.put(worker)


class _Worker:
    """A process that encodes one chunk at a time."""

    def __init__(self, definition: bytes) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # one thread each: the processes fill the cores
        }
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._definition: bytes | None = definition
        self.stopped = False

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Raises: OSError, EOFError if the process has ended; what it raises itself is raised here."""
        sink, source = self._process.stdin, self._process.stdout
        assert sink is not None
        assert source is not None
        if self._definition is not None:
            _send(sink, self._definition)
            self._definition = None
        _send(sink, pickle.dumps(_plain(chunk)))
        found = pickle.loads(_receive(source))
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, EncodedChunk)
        return found

    def stop(self) -> None:
        self.stopped = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent to a killed process cannot be flushed
                    pipe.close()


def main() -> None:
    """The worker's side: a chat format, then chunks, until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get into the answers
    with suppress(EOFError, BrokenPipeError):
        chat_format = pickle.loads(_receive(source))
        while True:
            _send(sink, pickle.dumps(_answer(pickle.loads(_receive(source)), chat_format)))


def _answer(chunk: list[Any], chat_format: ChatFormat) -> EncodedChunk | Exception:
    conversations = [
        Conversation(tuple(Message(role, content) for role, content in messages), origin)
        for origin, messages in chunk
    ]
    try:
        return encode_chunk(conversations, chat_format)
    except Exception as error:  # raised again by the parent, which has the user's ear
        return error


def _plain(chunk: Chunk) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(c.origin, [(message.role, message.content) for message in c.messages]) for c in chunk]


def _sendable(chat_format: ChatFormat) -> bytes | None:
    """None for a format that cannot travel, a plug-in's perhaps: it works here alone."""
    try:
        return pickle.dumps(chat_format)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(_LENGTH.pack(len(message)))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    head = pipe.read(_LENGTH.size)
    (length,) = _LENGTH.unpack(head) if len(head) == _LENGTH.size else (None,)
    message = b"" if length is None else pipe.read(length)
    if length is None or len(message) < length:
        raise EOFError("its pipe was closed")
    return message


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


if __name__ == "__main__":
    main()
