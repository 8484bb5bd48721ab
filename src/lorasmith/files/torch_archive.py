"""A .bin file of tensors before it is unpickled: an archive that holds no more than its own bytes.

torch.load takes compressed archives too, of which 66 KB become 64 MB; torch itself never writes one.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from lorasmith.errors import SetupError
from lorasmith.files.model_dir import require_regular

_MOST_ENTRIES = 200_000


def refuse_swelling(path: Path) -> None:
    """Raises: SetupError for an archive that is compressed, larger than the file, or of too many entries;
    zipfile.BadZipFile for what is no archive, such as the format before torch 1.6."""
    size = require_regular(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > size or len(entries) > _MOST_ENTRIES:
        why = "its archive is compressed or larger than the file: torch writes neither"
        fix = "get it as safetensors, from a source you trust"
        raise SetupError(f"{path.name} is refused", where=str(path), why=why, fix=fix)
