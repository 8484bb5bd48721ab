"""Several tokeniser processes give what one gives: the same rows, the same bad rows, in the same order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
from character_chat import CharacterChat

from lorasmith.data import workers as workers_module
from lorasmith.data.encode import EncodedChunk, encode_chunk
from lorasmith.data.workers import encode_chunks
from lorasmith.errors import TokenizerError
from lorasmith.families.opening import open_chat
from lorasmith.types import Conversation, Message, Piece

TINY = Path(workers_module.__file__).parents[1] / "assets/tiny"


def talks(count: int, odd: int = 7) -> list[Conversation]:
    """Every `odd`th one is refused by CharacterChat."""
    return [
        Conversation(
            (Message("user", "☢" if n % odd == 0 else f"q{n}"), Message("assistant", f"a{n} 你好")), f"f:{n}"
        )
        for n in range(count)
    ]


def chunks(rows: Sequence[Conversation], size: int = 20) -> list[Sequence[Conversation]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def told(found: EncodedChunk) -> tuple[object, ...]:
    columns = {name: column.tolist() for name, column in found.rows.columns().items()}
    return columns, found.kept, found.bad_rows


@pytest.mark.parametrize("make", [CharacterChat, lambda: open_chat(TINY)[1]], ids=["plain", "template"])
def test_any_number_of_workers_gives_the_same(make: type[CharacterChat]) -> None:
    rows = chunks(talks(200))
    alone = [(tuple(chunk), told(found)) for chunk, found in encode_chunks(rows, make(), workers=1)]
    assert len(alone) == 10
    shared = [
        (tuple(chunk), told(found)) for chunk, found in encode_chunks(rows, make(), workers=2, worth_it=40)
    ]
    assert shared == alone


def test_none_start_before_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert len(list(encode_chunks(chunks(talks(100)), CharacterChat(), workers=4))) == 5


def test_a_format_that_cannot_travel_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    chat_format = CharacterChat()
    chat_format.lock = lambda: None  # type: ignore[attr-defined]
    assert len(list(encode_chunks(chunks(talks(100)), chat_format, workers=2, worth_it=20))) == 5


class Failing(CharacterChat):
    """Refuses to go on at one conversation, as a tokenizer does whose file is damaged."""

    def pieces(self, messages: Sequence[Message], *, for_generation: bool = False) -> list[Piece]:
        if messages[0].content == "q130":
            raise TokenizerError("the vocabulary is damaged", where="q130")
        return super().pieces(messages, for_generation=for_generation)


def test_what_a_worker_raises_is_raised_here_in_its_turn() -> None:
    encoded = encode_chunks(chunks(talks(200)), Failing(), workers=2, worth_it=20)
    assert [chunk[0].origin for chunk, _ in islice(encoded, 6)] == [f"f:{n}" for n in range(0, 120, 20)]
    with pytest.raises(TokenizerError, match="damaged"):
        next(encoded)


def test_a_worker_that_is_killed_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def noted(*args: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(start(*args, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    rows = chunks(talks(400))
    encoded = encode_chunks(rows, CharacterChat(), workers=2, worth_it=20)
    found = [told(chunk) for _, chunk in islice(encoded, 5)]
    started[0].kill()
    with pytest.warns(UserWarning, match="a tokeniser process ended"):
        found += [told(chunk) for _, chunk in encoded]
    assert found == [told(encode_chunk(chunk, CharacterChat())) for chunk in rows]
    assert all(process.poll() is not None for process in started)


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # without a guard of __main__, as users write them
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_workers import chunks, talks; from character_chat import CharacterChat\n"
        "from lorasmith.data.workers import encode_chunks\n"
        "print('started', flush=True)\n"
        "for chunk, _ in encode_chunks(chunks(talks(200_000)), CharacterChat(), workers=2, worth_it=20):\n"
        "    print(len(chunk), flush=True)\n"
    )
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        for _ in range(20):
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to all of them
        _, errors = process.communicate(timeout=20)
    assert errors.count("KeyboardInterrupt") == 1  # the workers say nothing
    assert "started" not in errors
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _group_is_alive(process.pid):
        time.sleep(0.05)
    assert not _group_is_alive(process.pid)


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
