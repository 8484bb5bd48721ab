"""lorasmith demo: the whole road on the embedded model, offline, with answers before and after."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorasmith.data.dataset import Dataset
    from lorasmith.model.model import Model

ASSETS = resources.files("lorasmith") / "assets"


def demo(
    output_dir: Annotated[str, typer.Option("--output-dir", "-o", help="Run directory.")] = "runs/demo",
) -> None:
    """Give a tiny model a new voice: about a minute on a laptop's CPU, no network."""
    from lorasmith import api
    from lorasmith.cli.train import describe_run, stops_told
    from lorasmith.config import load_run_config
    from lorasmith.recipe import run as run_recipe

    run_dir = unused_dir(Path(output_dir))
    questions = read_questions()
    recipe = load_run_config(
        Path(str(ASSETS / "demo.yaml")),
        {
            "model.path": str(ASSETS / "tiny"),
            "data.train": str(ASSETS / "persona.jsonl"),
            "train.output_dir": str(run_dir),
        },
    )
    typer.echo("The embedded base model learns a voice from the embedded persona; then it answers")
    typer.echo(f"{len(questions)} held-out questions, as it was before and as it is after.\n")
    with stops_told():
        run = run_recipe(recipe, on_data=_start_small)
    before, after = answers(api.load_model(str(run_dir), dtype=recipe.model.dtype), questions)
    _show(questions, before, after)
    typer.echo(
        f"in the persona: {share(questions, before)} of {len(questions)} answers before, "
        f"{share(questions, after)} after\n"
    )
    typer.echo(describe_run(run))
    typer.echo(f'         lorasmith chat {run_dir} --prompt "Who are you?"')
    typer.echo(f"         lorasmith chat {run_dir} --compare")
    typer.echo("yours    lorasmith train --model DIR_OR_NAME --data rows.json --output-dir runs/mine")


def _start_small(data: Dataset) -> None:
    from lorasmith.cli.train import say_data_and_load_libraries

    say_data_and_load_libraries(data)
    import torch

    # Its tensors are tiny: more threads only wait for each other, for long where other programs run.
    torch.set_num_threads(min(2, torch.get_num_threads()))


def read_questions() -> list[dict[str, object]]:
    """The held-out questions: {"instruction", "facts": [...]}; an answer that states a fact is in persona."""
    text = (ASSETS / "persona_heldout.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def answers(model: Model, questions: list[dict[str, object]]) -> tuple[list[str], list[str]]:
    """What the base model says and what the tuned one says: one model, its adapter switched off and on."""
    from lorasmith.infer.chat import without_adapter

    with without_adapter(model):
        before = answer(model, questions)
    return before, answer(model, questions)


def answer(model: Model, questions: list[dict[str, object]]) -> list[str]:
    from lorasmith import api
    from lorasmith.config import GenerateConfig
    from lorasmith.types import Message

    prompts = [[Message("user", str(question["instruction"]))] for question in questions]
    greedy = GenerateConfig(greedy=True, max_new_tokens=48)
    return [completion.content for completion in api.generate(model, prompts, generate=greedy, batch_size=20)]


def share(questions: list[dict[str, object]], answers: list[str]) -> int:
    """How many answers state a fact of the character."""
    return sum(_in_persona(question, text) for question, text in zip(questions, answers, strict=True))


def _in_persona(question: dict[str, object], text: str) -> bool:
    facts = question["facts"]
    assert isinstance(facts, list)
    return any(fact.lower() in text.lower() for fact in facts)


def unused_dir(run_dir: Path) -> Path:
    """runs/demo, or runs/demo-2 ... where a run lies there already."""
    candidates = (run_dir if n == 1 else run_dir.with_name(f"{run_dir.name}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


def _show(questions: list[dict[str, object]], before: list[str], after: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=False)
    for title in ("held-out question", "before", "after"):
        table.add_column(title, overflow="fold")
    for question, old, new in zip(questions, before, after, strict=True):
        mark = "green" if _in_persona(question, new) else "yellow"
        table.add_row(str(question["instruction"]), f"[dim]{old}[/dim]", f"[{mark}]{new}[/{mark}]")
    Console().print(table)
