from __future__ import annotations

import io
from collections.abc import Iterator

import peft
import pytest
import typer
from byte_chat import SPECIAL_TOKENS, byte_model, endless_model, random_llama, speaking_model
from typer.testing import CliRunner

from lorasmith.cli import chat as command
from lorasmith.config import GenerateConfig
from lorasmith.errors import ConfigError, DataError
from lorasmith.model.model import Model

GREEDY = GenerateConfig(greedy=True, max_new_tokens=12)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def voices(model: Model, system: str | None = None) -> list[command.Voice]:
    return command.voices_of(model, GREEDY, system, compare=False)


def test_a_prompt_prints_the_answer_alone() -> None:
    out = io.StringIO()
    command.answer(voices(speaking_model("é中😀")), "hi", out)
    assert out.getvalue() == "é中😀\n"


def test_piped_lines_are_one_conversation_with_commands() -> None:
    out, speaking = io.StringIO(), voices(speaking_model("ok"))
    lines = [
        "hi\n",
        "\n",
        "/etc/hosts is a path\n",
        "/history\n",
        "/reset\n",
        "/history\n",
        "/exit\n",
        "no\n",
    ]
    command.read_aloud(speaking, lines, out)
    turns = ["user: hi", "assistant: ok", "user: /etc/hosts is a path", "assistant: ok"]
    assert out.getvalue().splitlines() == ["ok", "ok", *turns]


def test_a_piped_line_that_does_not_fit_ends_with_its_error() -> None:
    with pytest.raises(DataError, match="no room"):
        command.read_aloud(voices(byte_model(random_llama(max_positions=8))), ["x" * 20], io.StringIO())


def test_a_talk_goes_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    command.talk(voices(speaking_model_with_room(16)), ["x" * 20, "hi"], out)
    assert out.getvalue() == "ok\n"
    assert "no room for an answer" in capsys.readouterr().err


def speaking_model_with_room(positions: int) -> Model:
    model = speaking_model("ok")
    model.module.config.max_position_embeddings = positions
    return model


def test_ctrl_c_stops_the_answer_and_keeps_the_talk() -> None:
    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if self.getvalue() == "abab":
                super().write("^C")
                raise KeyboardInterrupt
            return super().write(text)

    out, speaking = Interrupting(), voices(endless_model())
    command.talk(speaking, ["hi", "/history"], out)
    assert out.getvalue() == "abab^C\n[stopped]\nuser: hi\nassistant: ababa\n"


def test_an_answer_that_was_cut_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    command.talk(voices(endless_model()), ["hi"], io.StringIO())
    assert "--max-new-tokens" in capsys.readouterr().err


def test_the_system_prompt_is_shown_and_replaced() -> None:
    out, speaking = io.StringIO(), voices(speaking_model("ok", system="You are 甄嬛"))
    command.talk(speaking, ["hi", "/system", "/system  a cat ", "/system", "/history", "/nonsense"], out)
    assert out.getvalue().startswith("ok\nYou are 甄嬛\na cat\nthere is no command /nonsense\n/reset")


@pytest.mark.parametrize("leaving", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_leave_at_the_prompt(leaving: type[BaseException]) -> None:
    typed: Iterator[str] = iter(["hi ", "", "there"])

    def read(_: str) -> str:
        if (line := next(typed, None)) is None:
            raise leaving
        return line

    assert list(command.typed_lines(read)) == ["hi", "there"]


def tuned_model() -> Model:
    model = speaking_model("ok")
    config = peft.LoraConfig(target_modules=["lm_head"], r=1, init_lora_weights=True)
    tuned = peft.get_peft_model(model.module, config).eval()
    layer = tuned.base_model.model.lm_head
    layer.lora_A["default"].weight.data.zero_()[0, ord("o")] = 1.0
    layer.lora_B["default"].weight.data.zero_()[SPECIAL_TOKENS["<end>"], 0] = 100.0
    model.module = tuned
    return model


def test_compare_shows_labelled_blocks_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    command.answer(command.voices_of(tuned_model(), GREEDY, None, compare=True), "hi", out)
    assert out.getvalue() == "[base]\nok\n[tuned]\no\n"


def test_compare_shows_columns_on_a_terminal() -> None:
    out = Terminal()
    command.show_side_by_side({"base": "plain [bold]text[/bold]", "tuned": "臣妾"}, out)
    rows = [line for line in out.getvalue().splitlines() if "臣妾" in line]
    assert len(rows) == 1
    assert "[bold]" in rows[0], "an answer is text, not markup"


def test_compare_needs_an_adapter() -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        command.voices_of(speaking_model("ok"), GREEDY, None, compare=True)


def test_each_sampling_knob_is_a_flag_with_its_default_and_words() -> None:
    app = typer.Typer()
    app.command()(command.chat)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for name, field in GenerateConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description in shown
        assert not field.default or f"[default: {field.default}]" in shown


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "0"],
        ["--top-p", "2"],
        ["--seed", "-1"],
        ["--dtype", "int4"],
        ["--hub", "github"],
        ["--chat-format", "alpaca"],
    ],
)
def test_a_knob_out_of_range_is_a_config_error_before_anything_is_loaded(flags: list[str]) -> None:
    app = typer.Typer()
    app.command()(command.chat)
    result = CliRunner().invoke(app, ["absent", *flags])
    assert isinstance(result.exception, ConfigError)
    assert flags[0].strip("-").replace("-", "_") in str(result.exception)
