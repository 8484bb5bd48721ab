"""A whole recipe: what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith import recipe
from lorasmith.config import load_run_config
from lorasmith.errors import ConfigError


def test_an_adapter_is_no_base_model(tmp_path: Path) -> None:
    """transformers would load both, and the run would train over the other adapter in silence."""
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    keys = {"model.path": str(tmp_path), "data.train": "rows.json", "train.output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="not a base model"):
        recipe.run(load_run_config(None, keys))
