"""lorasmith train: a recipe, flags over it, and what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand

from lorasmith.errors import ConfigError, Interrupted
from lorasmith.redaction import without_secrets

if TYPE_CHECKING:
    from lorasmith.api import Resume, Run
    from lorasmith.config import RunConfig
    from lorasmith.data.dataset import Dataset
    from lorasmith.memory.estimate import Plan

_NEWEST = "newest"
ResumeFlag: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="[prove]",
        help="Go on from the newest good checkpoint; `--resume prove` trains the steps before it again, "
        "compares them bit by bit and changes nothing.",
    ),
]
AllowChange: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY", help="What may differ from the run that is resumed: train.learning_rate, data, base."
    ),
]


def train(
    config: Annotated[Path | None, typer.Argument(help="A recipe in YAML; flags go over it.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a directory or a hub name.")] = None,
    data: Annotated[str | None, typer.Option(help="Training rows: a file or a hub data set.")] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Run directory.")] = None,
    family: Annotated[str | None, typer.Option(help="Family, if config.json does not tell.")] = None,
    hub: Annotated[str | None, typer.Option(help="huggingface or modelscope.")] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="error, or skip (writes rejects.jsonl).")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the config: train.learning_rate=2e-4."),
    ] = None,
    resume: ResumeFlag = None,
    allow_change: AllowChange = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do; read no weights.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Fine-tune a LoRA adapter."""
    from lorasmith.recipe import plan as plan_of
    from lorasmith.recipe import run as run_recipe
    from lorasmith.runs.progress import say

    flags = {
        "model.path": model,
        "model.family": family,
        "model.hub": hub,
        "data.train": data,
        "data.on_bad_row": on_bad_row,
        "train.output_dir": output_dir,
    }
    how = _resume_asked(resume)
    recipe = _read(config, flags, set_ or [], bool(how))
    if dry_run:
        plan = plan_of(recipe)
        typer.echo(without_secrets(json.dumps(asdict(plan)) if json_ else describe_plan(recipe, plan)))
        return
    asked: dict[str, Any] = {"resume": how, "allow_changes": allow_change or []}
    if json_:
        from lorasmith.cli.libraries import load_libraries
        from lorasmith.runs.progress import EventReporter

        with stops_told():
            run = run_recipe(recipe, reporter=EventReporter(), on_data=lambda data: load_libraries(), **asked)
        typer.echo(without_secrets(json.dumps(asdict(run), default=str)))
        return
    with stops_told():
        run = run_recipe(recipe, on_data=say_data_and_load_libraries, **asked)
    if not run.proved:  # a proof has said what came out, and made nothing new
        say(describe_run(run))


@contextmanager
def stops_told() -> Iterator[None]:
    """A run that was asked to stop says how to go on, and exits by its signal (see `lorasmith.errors`)."""
    from lorasmith.runs.progress import say

    try:
        yield
    except Interrupted as stop:  # typer knows any KeyboardInterrupt as 130, and says nothing
        say(str(stop), sys.stderr)
        raise typer.Exit(stop.exit_code) from stop


def say_data(data: Dataset) -> None:
    from lorasmith.runs.progress import say

    report = data.report
    held_out = f", {len(data.held_out):,} held out" if data.held_out else ""
    say(f"data: {len(data):,} rows to train on{held_out} ({report.format}: {report.format_reason})")
    for warning in data.warnings:
        say(f"warning: {without_secrets(warning)}", sys.stderr)


def say_data_and_load_libraries(data: Dataset) -> None:
    """They take seconds to load: what is known without them is told first."""
    from lorasmith.cli.libraries import load_libraries

    say_data(data)
    load_libraries()


def describe_plan(recipe: RunConfig, plan: Plan) -> str:
    parameters, memory = plan.parameters, plan.memory
    return "\n".join(
        [
            f"model       {recipe.model.path} (family {plan.family}, {plan.dtype})",
            f"data        {plan.num_examples:,} rows, {plan.tokens_per_epoch:,} tokens an epoch, "
            f"{plan.targets_per_epoch:,} of them trained; {plan.num_held_out:,} rows held out",
            f"steps       {plan.total_steps:,} of {recipe.train.batch_size} conversations; "
            f"shared prefixes save {plan.saved_by_sharing:.1%} of their tokens",
            f"parameters  {parameters.trainable:,} of {parameters.total:,} train "
            f"({parameters.trainable / parameters.total:.4%})",
            f"memory      about {memory.total / 1e9:.1f} GB: weights {memory.weights / 1e9:.1f}, "
            f"adapter {memory.adapter / 1e9:.2f}, activations {memory.activations / 1e9:.2f}"
            f"{describe_room(plan)}",
        ]
    )


def describe_room(plan: Plan) -> str:
    """What is free here, and what activation checkpointing makes of it."""
    free = "" if plan.free_memory is None else f"; {plan.free_memory / 1e9:.1f} GB are free here"
    recomputed = f"{plan.recomputed_layers} of {plan.num_layers} layers recompute their activations"
    return f"{free}; {recomputed}" if plan.recomputed_layers else free


def describe_run(run: Run) -> str:
    lines = []
    if run.eval_loss_before is not None and run.eval_loss_after is not None:
        lines.append(f"held-out loss {run.eval_loss_before:.4f} -> {run.eval_loss_after:.4f}")
    return "\n".join(
        [
            *lines,
            f"adapter  {run.output_dir}  (after {run.step:,} steps)",
            f"losses   {run.output_dir / 'loss.png'}",
            f"next     lorasmith chat {run.output_dir}",
        ]
    )


class ResumeCommand(TyperCommand):
    """`--resume` alone, and `--resume prove`: click's optional values would swallow a recipe that follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_with_explicit_resume(args)))


def _with_explicit_resume(args: Sequence[str]) -> Iterator[str]:
    """`--resume` with the value it means, so that no word but "prove" is taken for one."""
    rest = iter(args)
    for argument in rest:
        if argument == "--":
            yield from (argument, *rest)
        elif argument != "--resume":
            yield argument
        else:
            following = next(rest, None)
            yield "--resume=prove" if following == "prove" else f"--resume={_NEWEST}"
            if following not in (None, "prove"):
                yield from _with_explicit_resume([following, *rest])


def _resume_asked(value: str | None) -> Resume:
    """Raises: ConfigError for `--resume=` anything else."""
    if value is None or value == _NEWEST:
        return value is not None
    if value != "prove":
        raise ConfigError(f"--resume={value} is unknown", fix="write --resume, or --resume prove")
    return "prove"


def _read(config: Path | None, flags: dict[str, Any], sets: list[str], resume: bool) -> RunConfig:
    """The recipe with flags over it; a resume with nothing but its directory takes the run's own config."""
    from lorasmith.config import load_run_config, parse_override

    overrides = {key: value for key, value in flags.items() if value is not None}
    overrides.update(parse_override(text) for text in sets)
    directory = overrides.get("train.output_dir")
    if resume and config is None and directory:
        own = Path(directory) / "config.yaml"
        config = own if own.exists() else None
    return load_run_config(config, overrides)
