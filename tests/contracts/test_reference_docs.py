"""docs/reference/ is written from the code, and every page of docs/ points at things that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorasmith.config import GenerateConfig, RunConfig, load_run_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
KEYS = [
    f"{name}.{key}" for name, field in RunConfig.model_fields.items() for key in field.annotation.model_fields
]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)")
YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("script", ["write_reference.py", "write_figures.py"])
def test_the_reference_is_what_the_code_and_the_figures_say(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("key", [*KEYS, *GenerateConfig.model_fields])
def test_every_key_is_described(key: str) -> None:
    page = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
    assert row.rstrip(" |").rpartition("|")[2].strip(), f"{key} has no description"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [page.parent / target for target, _ in LINK.findall(page.read_text(encoding="utf-8"))]
    assert [str(target) for target in targets if not target.exists()] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_recipes_in_the_pages_are_read(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(YAML.findall(page.read_text(encoding="utf-8"))):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(text, encoding="utf-8")
        load_run_config(recipe, {})
