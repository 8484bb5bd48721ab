"""lorasmith merge: a run and its base as one model directory."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args

import typer

from lorasmith.cli.options import Checkpoint
from lorasmith.config import MergeLayout, ModelConfig, validate
from lorasmith.errors import ConfigError
from lorasmith.files.model_dir import read_json
from lorasmith.redaction import tree_without_secrets


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A training run, or any PEFT adapter directory.")],
    *,
    output_dir: Annotated[str, typer.Option(help="Where the model goes; must be new or empty.")],
    layout: Annotated[
        str,
        typer.Option(
            help="original: class and names of the base. native: Baichuan2-7B as Llama, ChatGLM3 as Glm, "
            "with a fast tokenizer; RUN may then be a base model too."
        ),
    ] = "original",
    checkpoint: Checkpoint = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: what the base has.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if not the one that RUN names.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print merge.json.")] = False,
) -> None:
    """Merge an adapter into its base model."""
    if layout not in get_args(MergeLayout):
        raise ConfigError(f"there is no layout {layout!r}", where="--layout", fix="choose original or native")
    if dtype is not None:
        validate(ModelConfig, {"dtype": dtype}, where="command line")
    from lorasmith.handover import merge as merge_run

    chosen: Any = {"layout": layout, "dtype": dtype, "base": base, "checkpoint": checkpoint}
    path = merge_run(run, output_dir=output_dir, **chosen)
    record = read_json(path / "merge.json")
    if json_:
        typer.echo(json.dumps(tree_without_secrets(record), indent=2, ensure_ascii=False))
        return
    typer.echo(f"wrote {path}: {record['architecture']}, {record['dtype']}, tokenizer {record['tokenizer']}")
    typer.echo(
        f"loaded again, its logits differ from the adapter's by {record['max_logit_difference']:.1e} at most "
        f"(allowed {record['allowed_difference']:.1e}; the adapter moves them by {record['moved']:.1e})"
    )
