"""lorasmith verify: does a run, or what was made of it, still say what it said when its training ended?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.options import Device
from lorasmith.config import ModelConfig, validate
from lorasmith.errors import SetupError

if TYPE_CHECKING:
    from lorasmith.evaluation.replay import PromptReport
    from lorasmith.evaluation.verification import Verification

_SAID = {
    "ok": "it says what it said when its training ended",
    "moved": "the numbers moved, by no more than rounding explains: read the lines above",
    "broken": "this is not the model that was trained: read the lines above",
}


def verify(
    path: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, an adapter made of it, or a merged directory.")
    ],
    *,
    base: Annotated[str | None, typer.Option(help="Base model, if not the one that RUN names.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16. Default: the recorded one.")] = None,
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Replay the prompts of golden.json and say what moved, by how much."""
    stated = {"device": device, **({"dtype": dtype} if dtype else {})}
    validate(ModelConfig, stated, where="command line")
    from lorasmith import api

    chosen: Any = {"base": base, "dtype": dtype, "device": device}
    found = api.verify(path, **chosen)
    typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False) if json_ else describe(found))
    if found.outcome == "moved":
        typer.echo(f"warning: {_SAID['moved']}", err=True)
    if found.outcome == "broken":
        raise typer.Exit(SetupError.exit_code)


def describe(found: Verification) -> str:
    prompts = [line for prompt in found.prompts for line in _prompt_lines(prompt)]
    return "\n".join(
        [
            *prompts,
            f"allowed     {found.allowed:.0e} of the largest logit, by dtype",
            f"adapter     {_effect(found.effect)}",
            f"base        {_base(found.base_equal)}",
            f"tokenizer   {_tokenizer(found)}",
            f"recorded    {_setting(found, 'recorded')}",
            f"here        {_setting(found, 'here')}",
            f"{found.outcome:<11} {_SAID[found.outcome]}",
        ]
    )


def _prompt_lines(prompt: PromptReport) -> list[str]:
    ids = {True: "equal", False: "OTHER", None: "not checked"}[prompt.ids_equal]
    first = "equal" if prompt.top1_equal else "OTHER"
    answer = "equal" if prompt.answer_equal else f"OTHER: {prompt.answer!r}"
    return [
        f"{prompt.outcome:<11} {prompt.prompt!r}",
        f"{'':<11} ids {ids}, logits {prompt.logit_difference:.1e} ({prompt.relative:.1e} of the largest), "
        f"first token {first}, answer {answer}",
    ]


def _effect(effect: float | None) -> str:
    return "has no effect on these prompts" if effect is None else f"{effect:.1%} of its effect is there"


def _base(equal: bool | None) -> str:
    if equal is None:
        return "merged: its weights are not compared"
    return "the one it was trained on" if equal else "OTHER weights or another layout than it was trained on"


def _tokenizer(found: Verification) -> str:
    if found.chat_format_problem:
        return f"no chat format, recorded ids replayed: {found.chat_format_problem}"
    changed = ", ".join(found.tokenizer_changes)
    return f"other files: {changed}" if changed else "the same files"


def _setting(found: Verification, which: str) -> str:
    setting = found.recorded if which == "recorded" else found.here
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    return f"{setting.dtype} on {setting.device}; {versions}"
