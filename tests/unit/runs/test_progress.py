import io

import pytest
from rich.console import Console

from lorasmith.runs.progress import LiveReporter, PlainReporter, StepLine, describe, duration

LINE = StepLine(10, 240, 2.34567, 1e-4, 0.5, 1234.5, 75)


def test_a_line_tells_loss_speed_and_time_left():
    assert describe(LINE) == ("step  10/240  loss  2.3457  lr 1.00e-04  grad  0.500  1,234 tok/s  ETA 1m15s")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0s"), (59.6, "1m00s"), (75, "1m15s"), (7260, "2h01m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_without_a_terminal(capsys):
    reporter = PlainReporter()
    reporter.start(0, 240)
    reporter.line(LINE)
    reporter.note("held-out loss 1.0")
    reporter.finish()
    assert capsys.readouterr().out.splitlines() == [describe(LINE), "held-out loss 1.0"]


def test_a_live_bar_on_a_terminal():
    screen = io.StringIO()
    reporter = LiveReporter(Console(file=screen, force_terminal=True, width=100))
    reporter.start(0, 240)
    reporter.advance(10)
    reporter.line(LINE)
    reporter.finish()
    assert "loss  2.3457" in screen.getvalue()
