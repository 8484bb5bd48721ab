"""A .bin file of tensors before it is unpickled: an archive that holds no more than its own bytes.

torch.load takes compressed archives too, of which 66 KB become 64 MB; torch itself never writes one. What it
wrote before 1.6 was no archive but a row of pickles, the first of them a number.
Source of the number: MAGIC_NUMBER in torch/serialization.py.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from lorasmith.errors import SetupError
from lorasmith.files.model_dir import require_regular

_MOST_ENTRIES = 200_000
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_SAVE_AGAIN = (
    "python -c 'import torch, safetensors.torch as s; "
    's.save_file(torch.load("{old}", map_location="cpu", weights_only=True), "{new}")\''
)


def refuse_swelling(path: Path) -> None:
    """Raises: SetupError for an archive that is compressed, larger than the file, or of too many entries, and
    for the format before torch 1.6; zipfile.BadZipFile for anything else that is no archive."""
    size = require_regular(path)
    _refuse_legacy(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > size or len(entries) > _MOST_ENTRIES:
        why = "its archive is compressed or larger than the file: torch writes neither"
        fix = "get it as safetensors, from a source you trust"
        raise SetupError(f"{path.name} is refused", where=str(path), why=why, fix=fix)


def _refuse_legacy(path: Path) -> None:
    """torch reads it by its first bytes, whatever archive may hang behind them."""
    with path.open("rb") as file:
        if _MAGIC_NUMBER not in file.read(32):  # a few bytes of pickle stand before it
            return
    save_again = _SAVE_AGAIN.format(old=path.name, new=f"{path.stem}.safetensors")
    raise SetupError(
        f"{path.name} is of the format before torch 1.6",
        where=str(path),
        why="it may be undamaged; only archives are read, whose size is known before they are unpickled",
        fix=f"if you trust its source, save it again as safetensors; in its directory: {save_again}",
    )
