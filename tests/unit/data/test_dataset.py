"""From file to examples: reports, limits, policies, the held-out split, and the figures of huanhuan."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from character_chat import SPECIAL, CharacterChat

from lorasmith.batching.fingerprint import fingerprint
from lorasmith.config import DataConfig
from lorasmith.data.dataset import Dataset, load, split
from lorasmith.data.encode import encode_conversations, fit_length
from lorasmith.data.survey import survey
from lorasmith.errors import ConfigError, DataError, SetupError, StorageError
from lorasmith.rows.findings import find, prompt_of
from lorasmith.types import IGNORE_INDEX, Conversation, Message

SHARED = Path(__file__).resolve().parents[4] / "shared"
HUANHUAN = SHARED / "data/datasets/huanhuan.json"


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **more}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows), encoding="utf-8")
    return str(path)


def load_rows(tmp_path: Path, rows: Sequence[Any], **config: Any) -> Dataset:
    return load(DataConfig(train=write(tmp_path / "rows.jsonl", rows), **config), CharacterChat())


def talk(question: str, answer: str, origin: str = "f:1") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), origin)


def test_a_file_becomes_examples_in_order(tmp_path: Path) -> None:
    data = load_rows(tmp_path, [row("a", "b"), row("c", "d")])
    assert [example.origin for example in data] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert [c.origin for c in data.conversations] == [example.origin for example in data.examples]
    bos, assistant, end = (SPECIAL[f"<|{name}|>"] for name in ("bos", "assistant", "end"))
    assert data[0].input_ids.tolist() == [bos, ord("a") + 4, assistant, ord("b") + 4]
    assert data[0].labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, ord("b") + 4, end]
    assert [example.origin for example in data[:1]] == ["rows.jsonl:1"]
    assert (data.report.format, len(data.held_out)) == ("alpaca", 0)


def test_bad_rows_are_one_error_with_a_count_per_rule(tmp_path: Path) -> None:
    rows = [row("a", "b"), *[row("a", "")] * 12, row("a", 5)]
    with pytest.raises(DataError, match=r"13 of 14 rows") as caught:
        load_rows(tmp_path, rows)
    told = str(caught.value)
    assert "empty-text: 12" in told
    assert "rows.jsonl:2  output = ''" in told
    assert "and 2 more" in told
    assert "rows.jsonl:14  output = 5" in told
    assert "--on-bad-row skip" in told


def test_skipped_rows_are_written_and_counted(tmp_path: Path) -> None:
    rows = [row("a", "b"), row("a", None), row("☢", "b"), row("☠", "b"), row("a", "☾")]
    config = DataConfig(train=write(tmp_path / "rows.jsonl", rows), on_bad_row="skip")
    rejects = tmp_path / "run" / "rejects.jsonl"
    data = load(config, CharacterChat(), rejects_path=rejects)
    assert len(data) == 1
    written = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert [(item["origin"][-1], item["rule"]) for item in written] == [
        ("2", "wrong-type"),
        ("3", "format-refuses"),
        ("4", "format-refuses"),
        ("5", "nothing-to-learn"),
    ]
    assert any(line.startswith("4 bad rows left out") for line in data.warnings)


def test_rejects_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    config = DataConfig(
        train=write(tmp_path / "rows.jsonl", [row("a", "b"), row("a", "")]), on_bad_row="skip"
    )
    with pytest.raises(StorageError, match="Not a directory"):
        load(config, CharacterChat(), rejects_path=tmp_path / "rows.jsonl" / "rejects.jsonl")


@pytest.mark.parametrize("rows", [[row("a", "")], [row("a", "b" * 50)]])
def test_no_rows_left_is_an_error(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match="no rows left to train on"):
        load_rows(tmp_path, rows, on_bad_row="skip", over_length="drop", max_length=10)


def test_longer_rows_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)1 row is longer than 10.*rows\.jsonl:2 \(53\).*data\.max_length to 53"
    ):
        load_rows(tmp_path, [row("a", "b"), row("a", "b" * 50)], max_length=10)


def test_the_models_own_limit_holds_where_none_is_told(tmp_path: Path) -> None:
    config = DataConfig(train=write(tmp_path / "rows.jsonl", [row("a", "b" * 50)]))
    with pytest.raises(DataError, match="longer than 10"):
        load(config, CharacterChat(), model_max_length=10)


def test_a_limit_above_the_models_own_is_told(tmp_path: Path) -> None:
    config = DataConfig(train=write(tmp_path / "rows.jsonl", [row("a", "b")]), max_length=20)
    assert (
        "max_length 20 is above the model's own 10"
        in load(config, CharacterChat(), model_max_length=10).warnings[0]
    )


def test_drop_leaves_out_and_truncate_cuts_without_an_end_token() -> None:
    talks = [talk("a", "b", "f:1"), talk("a", "bcdefgh", "f:2"), talk("a" * 20, "b", "f:3")]
    dropped = encode_conversations(talks, CharacterChat(), max_length=6, over_length="drop")
    assert ([e.origin for e in dropped.examples], dropped.dropped) == (["f:1"], ("f:2", "f:3"))
    cut = encode_conversations(talks, CharacterChat(), max_length=6, over_length="truncate")
    assert (cut.truncated, cut.dropped) == (("f:2",), ("f:3",))
    assert cut.examples[1].labels.tolist() == [IGNORE_INDEX] * 2 + [ord(letter) + 4 for letter in "bcde"]
    assert len(cut.examples[1]) == 6


def test_a_row_of_just_the_limit_is_kept() -> None:
    examples = encode_conversations(
        [talk("a", "bcd")], CharacterChat(), max_length=None, over_length="error"
    ).examples
    assert fit_length(examples, 6, "error").examples == examples


def test_encoding_names_rows_that_the_format_refuses_beyond_the_first_chunk() -> None:
    talks = [talk("a", "b", f"f:{number}") for number in range(2_500)]
    talks[1_700] = talk("☢", "b", "f:1700")
    with pytest.raises(DataError, match=r"1 of 2,500[\s\S]*f:1700"):
        encode_conversations(talks, CharacterChat(), max_length=None, over_length="error")


def test_findings_are_counted_and_placed() -> None:
    talks = [
        talk("a", "b", "f:1"),
        talk("a", "b", "f:2"),
        talk("a", "c", "f:3"),
        talk("<|end|> \nUser: x", "\u200b", "f:4"),
    ]
    found = find(talks, SPECIAL, CharacterChat.role_markers)
    assert found.duplicates == (("f:2", "f:1"),)
    assert found.repeated_prompts == 2
    assert [(c.answers, c.origins) for c in found.conflicts] == [(2, ("f:1", "f:2", "f:3"))]
    assert found.special_tokens == {"<|end|>": ("f:4",)}
    assert found.role_markers == {"\nUser:": ("f:4",)}
    assert found.invisible == {"U+200B": ("f:4",)}


def test_the_report_is_json_and_names_what_is_not_read(tmp_path: Path) -> None:
    rows = [{"instrution": "a", "output": "b", "id": "7"}, row("a", 5)]
    report = survey(write(tmp_path / "rows.jsonl", rows), DataConfig(), CharacterChat(), max_length=3).report
    machine = json.loads(json.dumps(report.to_json()))
    assert machine["ignored_columns"] == {"id": 1}
    assert machine["bad_by_rule"] == {"wrong-type": 1}
    assert machine["over_length"] == [["rows.jsonl:1", 4]]
    assert (machine["rows"], machine["conversations"]) == (2, 1)
    assert "column 'instrution' is read as 'instruction' (1 rows)" in machine["warnings"]
    assert machine["tokens"]["total"] == 4


# --- the held-out split ---


def sides(talks: list[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    training, held_out = split(talks, fraction)
    return [talks[row] for row in training], [talks[row] for row in held_out]


def some_talks(count: int, prompts: int) -> list[Conversation]:
    return [talk(f"q{number % prompts}", f"a{number}", f"f:{number}") for number in range(count)]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_no_prompt_stands_on_both_sides(fraction: float) -> None:
    talks = some_talks(3_000, 700)
    training, held_out = sides(talks, fraction)
    assert not {prompt_of(c) for c in training} & {prompt_of(c) for c in held_out}
    assert sorted(c.origin for c in training + held_out) == sorted(c.origin for c in talks)
    assert abs(len(held_out) / len(talks) - fraction) < 0.06


def test_the_split_does_not_hang_on_the_order_or_on_other_rows() -> None:
    talks = some_talks(500, 400)
    held_out = {c.origin for c in sides(talks, 0.3)[1]}
    shuffled = random.Random(0).sample(talks, len(talks))
    assert {c.origin for c in sides(shuffled, 0.3)[1]} == held_out
    assert {c.origin for c in sides(talks[:250], 0.3)[1]} == {o for o in held_out if int(o[2:]) < 250}


def test_an_equal_prompt_in_other_unicode_form_is_the_same_prompt() -> None:
    pairs = [(talk(f"é{n}", "a"), talk(f"e\u0301{n} ", "b")) for n in range(50)]
    talks = [one for pair in pairs for one in pair]
    training, _ = sides(talks, 0.5)
    assert len(training) == len({id(c) for c in training})
    assert all((a in training) == (b in training) for a, b in pairs)


def test_an_empty_side_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows to hold out"):
        split([talk("a", "b")], 1e-9)
    with pytest.raises(DataError, match="no rows to train on"):
        split([talk("a", "b")], 0.999999)


def test_a_share_is_held_out(tmp_path: Path) -> None:
    data = load_rows(tmp_path, [row(f"q{n}", "a") for n in range(200)], eval=0.2)
    assert len(data) + len(data.held_out) == 200
    assert [c.origin for c in data.held_out_conversations] == [e.origin for e in data.held_out]
    assert not {c.origin for c in data.conversations} & {c.origin for c in data.held_out_conversations}


def test_a_held_out_file_of_its_own_is_read_and_leaks_are_told(tmp_path: Path) -> None:
    own = write(tmp_path / "eval.jsonl", [row("q1", "x"), row("new", "x")])
    data = load_rows(tmp_path, [row("q1", "a"), row("q2", "a")], eval=own)
    assert [example.origin for example in data.held_out] == ["eval.jsonl:1", "eval.jsonl:2"]
    assert "1 held-out rows whose prompt is also trained on: eval.jsonl:1" in data.warnings
    assert data.eval_report is not None


def test_the_fingerprint_is_of_ids_and_labels_in_order(tmp_path: Path) -> None:
    data = load_rows(tmp_path, [row("a", "b"), row("c", "d")])
    assert data.fingerprint == fingerprint(list(data))
    assert fingerprint(reversed(data.examples)) != data.fingerprint
    assert load_rows(tmp_path, [row("a", "b"), row("c", "e")]).fingerprint != data.fingerprint


def test_a_hub_name_is_not_looked_for_where_a_file_is_meant(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file"):
        survey("missing/rows.json", DataConfig(), CharacterChat())


def test_no_source_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.train"):
        load(DataConfig(), CharacterChat())


def test_a_hub_data_set_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SetupError, match="hub-datasets"):
        survey("org/name", DataConfig(), CharacterChat())


def test_rows_of_a_hub_data_set_are_numbered_and_null_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [row("a", "b", system=None), row("a", None)]
    hub = SimpleNamespace(load_dataset=lambda name, split: table)
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    found = survey("org/name", DataConfig(), CharacterChat())
    assert [example.origin for example in found.examples] == ["org/name:1"]
    assert [(bad.origin, bad.rule) for bad in found.report.bad_rows] == [("org/name:2", "missing-field")]


def test_the_room_loads_no_torch() -> None:
    script = "import sys, lorasmith.data.dataset, lorasmith.batching.loader; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.skipif(not HUANHUAN.exists(), reason="the sibling folder shared/ is not here")
def test_the_figures_of_huanhuan() -> None:
    start = time.perf_counter()
    data = load(DataConfig(train=str(HUANHUAN), eval=0.02), CharacterChat())
    assert time.perf_counter() - start < 5
    found = data.report.findings
    assert (data.report.rows, data.report.bad_rows) == (3_729, ())
    assert (len(found.duplicates), found.repeated_prompts) == (112, 238)
    assert (len(found.conflicts), found.conflicting_rows) == (50, 238)
    assert data.report.tokens is not None
    assert data.report.tokens.supervised == sum(e.num_targets for e in (*data.examples, *data.held_out))
    assert sum(count for _, _, count in data.report.tokens.bars) == 3_729
    assert np.isclose(len(data.held_out) / 3_729, 0.02, atol=0.01)
