"""Small files of a model directory, read with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasmith.errors import SetupError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: SetupError naming the file when it is absent, damaged or no object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "check the path: a model directory holds config.json, the weights and the tokenizer"
        raise SetupError(f"there is no {path.name}", where=str(path.parent), fix=fix) from None
    except (OSError, ValueError) as error:
        raise SetupError(f"{path.name} cannot be read", where=str(path), why=str(error)) from None
    if not isinstance(tree, dict):
        raise SetupError(
            f"{path.name} is no JSON object", where=str(path), why=f"it is a {type(tree).__name__}"
        )
    return tree


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
