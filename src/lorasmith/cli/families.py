"""lorasmith families: what runs here, and what each was verified against."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def families(json_: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the model families."""
    from lorasmith.families import all_families, refused_plugins

    for error in refused_plugins():
        typer.echo(f"{error}\n", err=True)
    if json_:
        rows = [
            {
                "name": family.name,
                "title": family.title,
                "chat_formats": list(family.chat_formats),
                "target_modules": family.target_modules,
                "verified_against": family.verified_against,
            }
            for family in all_families()
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    for family in all_families():
        targets = (
            ", ".join(family.target_modules) if family.target_modules else "every linear layer but the head"
        )
        typer.echo(f"{family.name:<11} {family.title}")
        typer.echo(f"{'':<11} chat formats: {', '.join(family.chat_formats)}")
        typer.echo(f"{'':<11} target_modules auto: {targets}")
        typer.echo(f"{'':<11} verified against: {family.verified_against}")
