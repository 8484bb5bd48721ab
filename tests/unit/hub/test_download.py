"""Each look-up runs in a process of its own: huggingface_hub reads its settings once, when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stub_hub import COMMIT, serving

from lorasmith.errors import ConfigError, SetupError
from lorasmith.hub.download import download, resolve

FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_custom.py": b"raise SystemExit",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "README.md": b"#",
}
SAFE = {"model.safetensors": b"weights", "pytorch_model.bin": b"pickle"}
NOWHERE = "http://127.0.0.1:9"
PROGRAM = """
import sys
from pathlib import Path
from lorasmith.errors import LorasmithError
from lorasmith.hub.download import download
try:
    output_dir = Path(sys.argv[2]) if sys.argv[2] else None
    print(download("org/name", revision=sys.argv[1] or None, output_dir=output_dir))
except LorasmithError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def look_up(
    home: Path, endpoint: str, *, offline: bool = False, revision: str = "", output_dir: str = ""
) -> tuple[int, str]:
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1" if offline else "0"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, revision, output_dir],
        env={**os.environ, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert time.perf_counter() - start < 10, "an answer that is slow to come is no answer"
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.strip()


def names(directory: str) -> set[str]:
    return {path.name for path in Path(directory).iterdir() if not path.name.startswith(".")}


KEPT = {"config.json", "tokenizer.model", "chat_template.jinja"}


def test_a_directory_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("text", ["./absent", "~/absent", "/absent/dir", "a/b/c", "..", "C:\\models"])
def test_what_looks_like_a_path_is_never_asked_of_a_hub(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text == "..":
        assert resolve(text) == Path("..")
        return
    with pytest.raises(SetupError, match="there is no directory"):
        resolve(text)


@pytest.mark.parametrize("text", ["plain", "", "org/", "org/na me", "甄嬛/模型"])
def test_what_is_no_hub_name_is_told(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not text:
        assert resolve(text) == Path(), "an empty path is the working directory"
        return
    with pytest.raises(SetupError, match="neither a directory here nor a hub name"):
        resolve(text)


def test_a_file_is_answered_with_its_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SetupError, match="is a file") as caught:
        resolve(str(tmp_path / "model.safetensors"))
    assert str(tmp_path) in caught.value.fix
    with pytest.raises(SetupError, match="there is no file"):
        resolve("weights/model.safetensors")


def test_an_unknown_hub_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no hub 'github'"):
        download("org/name", hub="github")


def test_modelscope_is_an_extra() -> None:
    with pytest.raises(SetupError, match=r"not installed") as caught:
        download("org/name", hub="modelscope")
    assert "lorasmith[modelscope]" in caught.value.fix


def test_safetensors_are_taken_and_code_and_pickles_left(tmp_path: Path) -> None:
    with serving({**FILES, **SAFE}) as hub:
        code, directory = look_up(tmp_path, hub.url)
        assert code == 0
        assert names(directory) == {*KEPT, "model.safetensors"}
        assert (Path(directory) / "model.safetensors").read_bytes() == b"weights"
        asked = len(hub.asked)
        assert look_up(tmp_path, hub.url) == (0, directory)
        assert not [line for line in hub.asked[asked:] if "/resolve/" in line], "nothing is fetched twice"
    for offline in (True, False):
        assert look_up(tmp_path, NOWHERE, offline=offline) == (0, directory), (
            "the cache serves when the hub is away"
        )


def test_pickled_weights_are_taken_where_there_is_nothing_else(tmp_path: Path) -> None:
    pickled = {"pytorch_model-00001-of-00001.bin": b"pickle", "training_args.bin": b"pickle"}
    with serving({**FILES, **pickled}) as hub:
        code, directory = look_up(tmp_path, hub.url, output_dir=str(tmp_path / "here"))
    assert (code, directory) == (0, str(tmp_path / "here"))
    # consolidated.safetensors stands for the weights of another layout: it is left, and does not count
    assert names(directory) == {*KEPT, "pytorch_model-00001-of-00001.bin"}


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    code, told = look_up(tmp_path, NOWHERE, offline=True)
    assert code == 4
    assert "not whole in the cache" in told
    assert "HF_HUB_OFFLINE" in told


def test_a_network_that_is_down_comes_with_three_ways_out(tmp_path: Path) -> None:
    code, told = look_up(tmp_path, NOWHERE)
    assert code == 4
    assert "could not be downloaded" in told
    for way in ("local directory", "HF_ENDPOINT", "--hub modelscope"):
        assert way in told


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "RepoNotFound", "if you meant a directory, check the path"),
        (404, "RepoNotFound", "if you meant a directory, check the path"),
        (401, "GatedRepo", "hf auth login"),
        (403, "GatedRepo", "hf auth login"),
        (404, "RevisionNotFound", "has no revision 'v9'"),
        (500, "Broken", "could not be downloaded"),
    ],
)
def test_refusals_of_the_hub_are_told_apart(tmp_path: Path, status: int, code: str, expected: str) -> None:
    with serving(FILES, {"/api/models": (status, code)}) as hub:
        exit_code, told = look_up(tmp_path, hub.url, revision="v9")
    assert exit_code == 4
    assert expected in told


def test_gated_files_behind_an_open_listing_ask_for_a_login(tmp_path: Path) -> None:
    with serving({**FILES, **SAFE}, {"/resolve/": (403, "GatedRepo")}) as hub:
        code, told = look_up(tmp_path, hub.url)
    assert code == 4
    assert "hf auth login" in told


def test_a_revision_is_a_directory_of_its_own(tmp_path: Path) -> None:
    with serving({**FILES, **SAFE}) as hub:
        code, directory = look_up(tmp_path, hub.url, revision=COMMIT)
    assert (code, Path(directory).name) == (0, COMMIT)
