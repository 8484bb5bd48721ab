"""No token, key or password in a text that leaves, and nothing else masked."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lorasmith.config import DataConfig, RunConfig, to_yaml
from lorasmith.errors import DataError, SetupError
from lorasmith.redaction import MASK, tree_without_secrets, without_secrets
from lorasmith.runs.metrics import MetricsLog
from lorasmith.runs.progress import PlainReporter
from lorasmith.storage import Storage

WORD = st.text(string.ascii_letters + string.digits, min_size=24, max_size=40)
FORMS = {
    "hugging face": "hf_{}",
    "bearer": "Authorization: Bearer {}",
    "basic": "authorization: basic {}==",
    "address": "https://user:{}@mirror.example/org/name",
    "user only": "http://{}@mirror.example",
    "query": "https://hub.example/file?rev=1&token={}&x=2",
    "signed": "https://bucket.example/a?X-Amz-Signature={}",
    "openai": "sk-{}",
    "github": "ghp_{}",
}
AROUND = st.text(max_size=30)


@pytest.mark.parametrize("form", FORMS)
@given(before=AROUND, secret=WORD, after=AROUND)
@settings(max_examples=300, deadline=None)
def test_a_secret_is_masked_whatever_stands_around_it(
    form: str, before: str, secret: str, after: str
) -> None:
    assume(secret not in before + after)
    text = f"{before} {FORMS[form].format(secret)} {after}"
    assert secret not in without_secrets(text)
    assert MASK in without_secrets(text)


@given(value=st.text(string.printable.strip(), min_size=8, max_size=40), before=AROUND, after=AROUND)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_value_of_a_secret_in_the_environment_is_masked(
    monkeypatch: pytest.MonkeyPatch, value: str, before: str, after: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", value)
        assert value.strip() not in without_secrets(f"{before}{value}{after}").replace(MASK, "")


@given(text=st.text(string.ascii_letters + " .,:/你好\n", max_size=200))
@settings(max_examples=300, deadline=None)
def test_plain_words_stay(text: str) -> None:
    if "earer" not in text.lower() and "asic" not in text.lower():
        assert without_secrets(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name@main",
        "user@example.org wrote to a@b",
        "hf_short",
        "lora_A.weight (8, 64)",
        "the token <|im_start|> and max_tokens=512, learning_rate 2e-4",
        "/home/me/runs/hf_runs/step-000200",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_a_short_or_unnamed_value_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc")
    monkeypatch.setenv("SOMETHING", "a long value of no secret")
    assert without_secrets("abc a long value of no secret") == "abc a long value of no secret"


SECRET = "hf_" + "aB3" * 11


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    error = SetupError(f"no {SECRET}", where=f"https://me:{SECRET}@hub", why=f"Bearer {SECRET}", fix=SECRET)
    assert SECRET not in str(error) + repr(error) + repr(vars(error)) + repr(error.args)
    assert str(DataError("what", where="rows.jsonl:3")) == "what\n  where: rows.jsonl:3"


def test_config_yaml() -> None:
    config = RunConfig(data=DataConfig(train=f"https://me:{SECRET}@hub/rows.json", system=f"say '{SECRET}'"))
    text = to_yaml(config)
    assert SECRET not in text
    assert yaml.safe_load(text)["data"]["train"] == "https://***@hub/rows.json"
    assert yaml.safe_load(text)["data"]["system"] == "say '***'"


def test_metrics_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(Storage(), tmp_path, resumed_at=None).write(step=1, loss=0.5, note=f"by {SECRET}")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "note": "by ***"}
    PlainReporter().note(f"got {SECRET}")
    assert capsys.readouterr().out == "got ***\n"


def test_trees_keep_their_shape() -> None:
    tree = {"a": [1, 2.5, None, True, {"b": SECRET}], SECRET: "x"}
    assert tree_without_secrets(tree) == {"a": [1, 2.5, None, True, {"b": MASK}], MASK: "x"}


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_the_command_line(tmp_path: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "lorasmith", "train", f"{tmp_path}/{SECRET}.yaml", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert MASK in done.stderr
    assert SECRET not in done.stdout + done.stderr
