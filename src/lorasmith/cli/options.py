"""Options that several verbs share, each with the words of the config field that it sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from lorasmith.config import GenerateConfig, ModelConfig, validate

if TYPE_CHECKING:
    from lorasmith.model.model import Model


def _told(field: str) -> Any:
    return typer.Option(help=ModelConfig.model_fields[field].description)


Source: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="A model directory, a hub name, or a training run.")
]
Adapter: TypeAlias = Annotated[str | None, typer.Option(help="Adapter directory over this base model.")]
Checkpoint: TypeAlias = Annotated[int | None, typer.Option(help="Step of the run, instead of its end.")]
System: TypeAlias = Annotated[
    str | None, typer.Option(help='System prompt; "" for none. Default: what the run was trained with.')
]
FamilyName: TypeAlias = Annotated[str, _told("family")]
ChatFormatName: TypeAlias = Annotated[
    str | None, typer.Option(help="official or tutorial. Default: the run's own, else official.")
]
DtypeName: TypeAlias = Annotated[str, _told("dtype")]
Device: TypeAlias = Annotated[str, _told("device")]
Hub: TypeAlias = Annotated[str, _told("hub")]
Revision: TypeAlias = Annotated[str | None, _told("revision")]


def load_checked(
    model_or_run: str, *, adapter: str | None, checkpoint: int | None, **options: str | None
) -> Model:
    """`api.load_model` with options that are known to be good, so that a typo costs no loading of torch.

    `options` are family, chat_format, dtype, device and hub. Raises: ConfigError naming a bad one.
    """
    stated = {name: value for name, value in options.items() if value is not None}
    validate(ModelConfig, stated, where="command line")
    from lorasmith.api import load_model

    chosen: dict[str, Any] = dict(options)
    return load_model(model_or_run, adapter=adapter, checkpoint=checkpoint, **chosen)


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` one option for each field of GenerateConfig; it is called with them as `sampling`.

    Raises, when called: ConfigError naming a value out of range.
    """
    options = sampling_parameters()
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "sampling"
    ]

    @wraps(command)
    def called_with_options(**values: Any) -> None:
        knobs = {option.name: values.pop(option.name) for option in options}
        command(sampling=validate(GenerateConfig, knobs, where="command line"), **values)

    parameters = [*own, *options]
    called_with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called_with_options.__annotations__ = {option.name: option.annotation for option in parameters}
    return called_with_options


def sampling_parameters() -> list[inspect.Parameter]:
    """GenerateConfig's fields as keyword parameters that typer understands."""
    hints = get_type_hints(GenerateConfig)
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[hints[name], _option(name, hints[name], field.description)],
        )
        for name, field in GenerateConfig.model_fields.items()
    ]


def _option(name: str, kind: Any, help_text: str | None) -> Any:
    flag = "--" + name.replace("_", "-")
    metavar = None if kind is bool else "INT" if kind in (int, int | None) else "NUMBER"
    return typer.Option(flag, help=help_text, metavar=metavar, rich_help_panel="Sampling")
