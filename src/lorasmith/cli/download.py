"""lorasmith download: a hub name -> the directory of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorasmith.cli.options import Hub, Revision


def download(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Name on the hub: org/name.")],
    hub: Hub = "huggingface",
    revision: Revision = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where to put the files. Default: the hub's own cache.")
    ] = None,
) -> None:
    """Fetch a model's files (never its code); prints their directory. Runs again where it was cut off."""
    from lorasmith.hub.download import download as fetch

    typer.echo(fetch(repo, hub=hub, revision=revision, output_dir=output_dir))
