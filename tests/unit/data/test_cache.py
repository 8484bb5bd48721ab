"""The cache of encoded rows: as the cold road in everything it gives, a new entry for every other input, and
never an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from character_chat import CharacterChat

from lorasmith.config import DataConfig
from lorasmith.data import cache as cache_module
from lorasmith.data.cache import Cache, entry_key
from lorasmith.data.dataset import load
from lorasmith.data.survey import Survey, survey
from lorasmith.families import find_family
from lorasmith.families.opening import open_chat
from lorasmith.text.jinja import TemplateFormat
from lorasmith.text.loading import load_tokenizer
from lorasmith.text.template import ChatFormat
from lorasmith.tokenization.fast import FastTokenizer

TINY = Path(cache_module.__file__).parents[1] / "assets/tiny"


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return open_chat(TINY)[1]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", min_rows=1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Good rows, a duplicate, a conflict, a bad row, one that the format refuses, marks, an unread column."""
    lines: list[dict[str, Any]] = [{"prompt": f"q{n}", "completion": f"a{n} 你好"} for n in range(30)]
    lines += [
        {"prompt": "q1", "completion": "a1 你好"},
        {"prompt": "q2", "completion": "other\u200b", "id": 7},
    ]
    lines += [{"prompt": "", "completion": "x"}, {"prompt": "<|end|>", "completion": "long " * 40}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def look(rows: Path, chat_format: ChatFormat, cache: Cache, **config: Any) -> Survey:
    return survey(str(rows), DataConfig(train=str(rows), **config), chat_format, max_length=30, cache=cache)


def entries(cache: Cache) -> list[Path]:
    return sorted(cache.directory.glob("*.rows"))


def assert_same(one: Survey, other: Survey) -> None:
    assert one.report == other.report
    assert json.dumps(one.report.to_json()) == json.dumps(other.report.to_json())
    assert list(one.conversations) == list(other.conversations)
    assert len(one.examples) == len(other.examples) > 0
    for a, b in zip(one.examples, other.examples, strict=True):
        assert (a.origin, a.input_ids.tolist(), a.labels.tolist()) == (
            b.origin,
            b.input_ids.tolist(),
            b.labels.tolist(),
        )
        assert a.input_ids.dtype == b.input_ids.dtype == np.int64


def test_warm_is_cold_and_reads_no_row(
    rows: Path, chat_format: ChatFormat, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = survey(
        str(rows), DataConfig(train=str(rows), cache=False), chat_format, max_length=30, cache=cache
    )
    assert not cache.directory.exists()
    cold = look(rows, chat_format, cache)
    assert len(entries(cache)) == 1
    monkeypatch.setattr("lorasmith.data.survey.read_records", lambda *_: pytest.fail("a row was read"))
    warm = look(rows, chat_format, cache)
    assert_same(bare, cold)
    assert_same(cold, warm)
    found = warm.report.findings
    assert (len(found.duplicates), len(found.conflicts), len(warm.report.bad_rows)) == (1, 1, 1)
    assert warm.report.over_length
    assert warm.report.ignored_columns == {"id": 1}


def test_a_data_set_is_the_same_from_the_cache(
    tmp_path: Path, chat_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "own"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "q{n}", "completion": "a"}}\n' for n in range(1200)))
    config = DataConfig(train=str(path), eval=0.1, max_length=60, over_length="truncate")
    cold, warm = (load(config, chat_format) for _ in range(2))
    assert len(list((tmp_path / "own/data").glob("*.rows"))) == 1
    assert (
        cold.fingerprint
        == warm.fingerprint
        == load(config.model_copy(update={"cache": False}), chat_format).fingerprint
    )
    assert cold.warnings == warm.warnings
    assert [e.origin for e in cold.held_out] == [e.origin for e in warm.held_out]
    assert [c.origin for c in warm.held_out_conversations] == [e.origin for e in warm.held_out]


def test_few_rows_are_not_kept(rows: Path, chat_format: ChatFormat, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    look(rows, chat_format, cache)
    assert entries(cache) == []


# --- every input is in the key ---


@pytest.mark.parametrize(
    "config",
    [
        {"system": "You are a dragon."},
        {"format": "prompt-completion"},
        {"columns": {"prompt": "prompt"}},
        {"input_separator": " "},
    ],
)
def test_how_rows_are_read_is_in_the_key(rows: Path, chat_format: ChatFormat, config: dict[str, Any]) -> None:
    plain = entry_key(rows, DataConfig(), chat_format)
    assert entry_key(rows, DataConfig(**config), chat_format) != plain


@pytest.mark.parametrize("later", [{"max_length": 7}, {"over_length": "drop"}, {"eval": 0.5}])
def test_what_comes_after_encoding_is_not(rows: Path, chat_format: ChatFormat, later: dict[str, Any]) -> None:
    assert entry_key(rows, DataConfig(**later), chat_format) == entry_key(rows, DataConfig(), chat_format)


def test_the_content_and_the_name_of_the_file_are_in_the_key(
    rows: Path, tmp_path: Path, chat_format: ChatFormat
) -> None:
    plain = entry_key(rows, DataConfig(), chat_format)
    status = rows.stat()
    renamed = shutil.copy(rows, tmp_path / "other.jsonl")
    assert entry_key(Path(renamed), DataConfig(), chat_format) != plain  # errors quote the name
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert entry_key(Path(shutil.copy(rows, elsewhere)), DataConfig(), chat_format) == plain
    rows.write_bytes(rows.read_bytes().replace(b"q7", b"Q7"))
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time, other rows
    assert entry_key(rows, DataConfig(), chat_format) != plain


def test_the_tokenizer_and_the_template_are_in_the_key(rows: Path, tmp_path: Path) -> None:
    def key_of(change: Callable[[str], str], name: str) -> str | None:
        directory = tmp_path / "model"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        file = directory / name
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
        return entry_key(rows, DataConfig(), open_chat(directory)[1])

    plain = key_of(str, "tokenizer.json")

    def without_last_merge(text: str) -> str:
        tree = json.loads(text)
        tree["model"]["merges"].pop()
        return json.dumps(tree)

    assert plain is not None
    assert key_of(str, "tokenizer.json") == plain
    assert key_of(without_last_merge, "tokenizer.json") != plain
    assert key_of(lambda text: text + "{# another one #}", "chat_template.jinja") != plain


def test_a_template_that_prints_the_date_is_another_one_tomorrow(rows: Path, tmp_path: Path) -> None:
    def key_on(day: int, template: str) -> str | None:
        tokenizer = load_tokenizer(TINY)
        assert isinstance(tokenizer, FastTokenizer)
        tokenizer.chat_template = template
        return entry_key(rows, DataConfig(), TemplateFormat(tokenizer, now=datetime(2026, 1, day)))

    plain = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
    dated = "{{ strftime_now('%d %b %Y') }}" + plain
    assert key_on(1, plain) == key_on(2, plain)
    assert key_on(1, dated) == key_on(1, dated) != key_on(2, dated)


def test_the_chat_format_is_in_the_key(shared: Path, rows: Path, tmp_path: Path) -> None:
    source = shared / "data/tokenizers/deepseek-llm/tokenizer.rebuilt.json"
    (tmp_path / "tokenizer.json").symlink_to(source)
    family, tokenizer = find_family({}, "deepseek"), load_tokenizer(tmp_path)
    keys = {
        entry_key(rows, DataConfig(), family.chat_format(name, tokenizer)) for name in family.chat_formats
    }
    assert len(keys) == 2


def test_a_tokenizer_that_cannot_tell_what_it_depends_on_is_not_cached(rows: Path, cache: Cache) -> None:
    assert entry_key(rows, DataConfig(), CharacterChat()) is None
    look(rows, CharacterChat(), cache)
    assert entries(cache) == []


# --- a cache never hurts ---


def damaged(how: str, data: bytes) -> bytes:
    flipped = bytearray(data)
    flipped[{"head": 3, "header": 80, "content": len(data) // 2, "last": -65}.get(how, 0)] ^= 1
    whole = {"empty": b"", "cut": data[:-5000], "foreign": b"PK\x03\x04" * 500, "short": data[:30]}
    return whole.get(how, bytes(flipped))


@pytest.mark.parametrize("how", ["empty", "cut", "foreign", "short", "head", "header", "content"])
def test_a_damaged_entry_is_told_and_made_anew(
    how: str, rows: Path, chat_format: ChatFormat, cache: Cache
) -> None:
    cold = look(rows, chat_format, cache)
    (entry,) = entries(cache)
    good = entry.read_bytes()
    entry.unlink()  # the survey above has the old file mapped
    entry.write_bytes(damaged(how, good))
    with pytest.warns(UserWarning, match="a file of the data cache is not used"):
        again = look(rows, chat_format, cache)
    assert_same(cold, again)
    assert entry.read_bytes() == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(cold, look(rows, chat_format, cache))


def test_an_entry_of_other_rows_under_this_name_is_not_used(
    rows: Path, chat_format: ChatFormat, cache: Cache
) -> None:
    look(rows, chat_format, cache)
    (entry,) = entries(cache)
    foreign = entry.read_bytes()
    rows.write_text('{"prompt": "new", "completion": "row"}\n')
    look(rows, chat_format, cache)
    (new,) = (path for path in entries(cache) if path != entry)
    new.unlink()
    new.write_bytes(foreign)
    with pytest.warns(UserWarning, match="of other rows"):
        assert [c.messages[-1].content for c in look(rows, chat_format, cache).conversations] == ["row"]


def test_a_directory_that_cannot_be_made_is_no_error(
    rows: Path, chat_format: ChatFormat, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    cache = Cache(tmp_path / "file" / "cache", min_rows=1)
    with pytest.warns(UserWarning, match="not cached"):
        found = look(rows, chat_format, cache)
    assert found.report.conversations == 33


def test_a_full_disk_is_no_error_and_leaves_nothing(
    rows: Path, chat_format: ChatFormat, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_entry", full)
    with pytest.warns(UserWarning, match="No space left"):
        found = look(rows, chat_format, cache)
    assert found.report.conversations == 33
    assert list(cache.directory.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    rows: Path, chat_format: ChatFormat, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([(1, 1, 1), (1, 2, 2)])
    monkeypatch.setattr("lorasmith.data.survey._state_of", lambda source: next(states))
    assert look(rows, chat_format, cache).report.conversations == 33
    assert entries(cache) == []


def test_the_entries_that_were_used_longest_ago_go_but_none_in_use(
    rows: Path, chat_format: ChatFormat, cache: Cache
) -> None:
    kept = [look(rows, chat_format, cache, system=f"s{n}") for n in range(2)]  # mapped by this process
    in_use = entries(cache)
    script = (
        "import sys; from pathlib import Path; from lorasmith.data.cache import Cache\n"
        "import numpy as np\n"
        "cache = Cache(Path(sys.argv[1]), max_bytes=1)\n"
        "for n in range(3): cache.store(f'{n:040}', {}, {'a': [np.zeros(9, np.int32)]})"
    )
    stale = cache.directory / "left.unfinished"
    stale.write_bytes(b"x")
    os.utime(stale, (time.time() - 2 * 86400,) * 2)
    subprocess.run([sys.executable, "-c", script, str(cache.directory)], check=True)
    assert set(in_use) <= set(entries(cache))
    assert len(entries(cache)) == len(in_use) + 1
    assert not stale.exists()
    del kept
    subprocess.run([sys.executable, "-c", script, str(cache.directory)], check=True)
    assert len(entries(cache)) == 1


def test_two_processes_that_build_at_once_both_succeed(tmp_path: Path, rows: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from lorasmith.config import DataConfig; from lorasmith.data.cache import Cache\n"
        "from lorasmith.data.survey import survey; from lorasmith.families.opening import open_chat\n"
        "source, directory, model = sys.argv[1:]\n"
        "format = open_chat(Path(model))[1]\n"
        "cache = Cache(Path(directory), min_rows=1)\n"
        "print(survey(source, DataConfig(train=source), format, cache=cache).report.tokens.total)"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(rows), str(tmp_path / "cache"), str(TINY)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    done = [(*process.communicate(), process.returncode) for process in running]
    assert len({answer for answer, _, _ in done}) == 1
    assert [(error, code) for _, error, code in done] == [("", 0)] * 2
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".rows"]


def test_entries_are_for_their_owner_alone(rows: Path, chat_format: ChatFormat, cache: Cache) -> None:
    look(rows, chat_format, cache)
    assert entries(cache)[0].stat().st_mode & 0o077 == 0
    assert cache.directory.stat().st_mode & 0o077 == 0
