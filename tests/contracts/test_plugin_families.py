"""A family from another package: the one of docs/add-a-family.md, and every way in which one can be unfit."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.errors import FamilyError
from lorasmith.families import all_families, find_family, refused_plugins
from lorasmith.families.opening import open_chat
from lorasmith.testing import LawBroken, check_family

PAGE = Path(__file__).resolve().parents[2] / "docs/add-a-family.md"
BUILT_IN = ["llama3", "deepseek", "baichuan2", "chatglm3", "transnormer", "glm4", "qwen3", "generic"]
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put files and entry points where an installed package has them."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def put(name: str, files: dict[str, str], entry_points: dict[str, str]) -> None:
        for path, content in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(content, encoding="utf-8")
        info = site / f"{name.replace('-', '_')}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        rows = [f"{key} = {value}" for key, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[lorasmith.families]", *rows]))

    return put


@pytest.fixture
def parrot(install: Install) -> dict[str, str]:
    """The plug-in of the docs, file by file, installed; returns its files."""
    blocks = re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    files = dict(blocks)
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    install(project["name"], files, project["entry-points"]["lorasmith.families"])
    return files


def test_the_page_holds_a_whole_package(parrot: dict[str, str]) -> None:
    assert set(parrot) == {"lorasmith_parrot/family.py", "lorasmith_parrot/modeling.py", "test_parrot.py"}


def test_the_plugin_of_the_docs_keeps_the_laws(parrot: dict[str, str], tmp_path: Path) -> None:
    space: dict[str, Callable[[Path], None]] = {}
    exec(compile(parrot["test_parrot.py"], "test_parrot.py", "exec"), space)
    space["test_parrot_keeps_the_laws"](tmp_path)


def test_the_plugin_of_the_docs_runs_like_any_other(parrot: dict[str, str], tmp_path: Path) -> None:
    assert [family.name for family in all_families()] == [*BUILT_IN[:-1], "parrot", "generic"]
    assert not refused_plugins()
    space: dict[str, Callable[..., torch.nn.Module]] = {}
    exec(compile(parrot["test_parrot.py"], "test_parrot.py", "exec"), space)
    space["write_tokenizer"](tmp_path)
    module = space["tiny_parrot"]()
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    found, chat_format = open_chat(tmp_path)
    assert (found.name, chat_format.name) == ("parrot", "official")
    loaded = ls.load_module(str(tmp_path), dtype="fp32")
    assert type(loaded).__name__ == "ParrotForCausalLM"
    shown = CliRunner().invoke(app, ["families", "--json"])
    assert "parrot" in [row["name"] for row in json.loads(shown.stdout)]


FAMILY = """
from dataclasses import replace
from lorasmith.families import find_family
FAMILY = replace(find_family({}, "llama3"), %s)
"""


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("FAMILY = 7", "it is of type int, not lorasmith.families.Family"),
        ("OTHER = 7", "AttributeError"),
        ("raise SystemExit('not on this machine')", "SystemExit: not on this machine"),
        (FAMILY % "name=None", "its name is None"),
        (FAMILY % "name='new', fits=True", "its `fits` is no function"),
        (FAMILY % "name='new', chat_formats=None", "no chat format 'official'"),
        (FAMILY % "name='deepseek'", "the name 'deepseek' is taken"),
        (FAMILY % "name='generic'", "the name 'generic' is taken"),
        (FAMILY % "name='auto'", "the name 'auto' is taken"),
        (FAMILY % "name='new', chat_formats={}", "no chat format 'official'"),
    ],
)
def test_an_unfit_plugin_is_told_and_left_out(install: Install, content: str, why: str) -> None:
    module = f"unfit_{abs(hash(content))}"
    install("some-package", {f"{module}.py": content}, {"broken": f"{module}:FAMILY"})
    assert [family.name for family in all_families()] == BUILT_IN
    (error,) = refused_plugins()
    assert why in error.why
    assert "some-package" in error.where
    assert find_family({"model_type": "llama", "vocab_size": 128256}).name == "llama3"
    with pytest.raises(FamilyError, match="plug-in family 'broken' cannot be used"):
        find_family({}, "broken")
    with pytest.raises(FamilyError, match="fits no family") as caught:
        find_family({})
    assert "cannot be used, `lorasmith families` tells why: broken" in caught.value.fix
    shown = CliRunner().invoke(app, ["families"])
    assert why in shown.stderr
    assert "Baichuan2" in shown.stdout
    assert shown.exit_code == 0


def test_two_plugins_of_one_name(install: Install) -> None:
    install("one", {"one_family.py": FAMILY % "name='twin'"}, {"a": "one_family:FAMILY"})
    install("two", {"two_family.py": FAMILY % "name='twin'"}, {"b": "two_family:FAMILY"})
    assert [family.name for family in all_families()].count("twin") == 1
    assert [error.where for error in refused_plugins()] == ["two_family:FAMILY, of two"]


def test_a_fits_that_raises_stands_in_nobodys_way(install: Install) -> None:
    content = FAMILY % "name='rude', fits=lambda config: config['no such key']"
    install("rude", {"rude_family.py": content}, {"rude": "rude_family:FAMILY"})
    with pytest.warns(UserWarning, match="plug-in family rude was left out"):
        assert find_family({"model_type": "qwen2"}).name == "generic"


def test_a_plugin_that_fits_what_a_built_in_fits_is_told(install: Install) -> None:
    install("greedy", {"greedy_family.py": FAMILY % "name='greedy'"}, {"greedy": "greedy_family:FAMILY"})
    config = {"model_type": "llama", "vocab_size": 128256}
    with pytest.raises(FamilyError, match="llama3 and greedy") as caught:
        find_family(config)
    assert "vocab_size 128256" in caught.value.why
    assert find_family(config, "greedy").name == "greedy"


def test_model_classes_that_cannot_be_imported(install: Install, tmp_path: Path) -> None:
    changes = "name='bare', modeling='not_there.modeling', fits=lambda config: config['model_type'] == 'bare'"
    install("bare", {"bare_family.py": FAMILY % changes}, {"bare": "bare_family:FAMILY"})
    (tmp_path / "config.json").write_text('{"model_type": "bare"}')
    with pytest.raises(FamilyError, match="model classes of the family bare"):
        ls.load_module(str(tmp_path))


def test_a_family_for_another_config_json_breaks_a_law(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(LawBroken, match="fits its family"):
        check_family(find_family({}, "llama3"), tmp_path)
