"""lorasmith convert: an adapter from one layout of its model to the other."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from lorasmith.config import AdapterForm
from lorasmith.errors import ConfigError


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run, or any PEFT adapter directory.")],
    *,
    to: Annotated[
        str,
        typer.Option(
            help="split: over q, k and v of the native layout. fused: over W_pack or query_key_value."
        ),
    ],
    output_dir: Annotated[str, typer.Option(help="Where the adapter goes; must be new or empty.")],
    base: Annotated[
        str | None, typer.Option(help="Model it was trained on, if not the one that it names.")
    ] = None,
    new_base: Annotated[
        str | None, typer.Option(help="Written as the name of the model that the result belongs to.")
    ] = None,
) -> None:
    """Convert a Baichuan2 or ChatGLM3 adapter to the native layout of its model, or back."""
    if to not in get_args(AdapterForm):
        raise ConfigError(f"there is no form {to!r}", where="--to", fix="choose split or fused")
    from lorasmith.handover import convert_adapter

    chosen: Any = {"to": to, "base": base, "new_base": new_base}
    path = convert_adapter(adapter, output_dir=output_dir, **chosen)
    typer.echo(f"wrote {path}")
