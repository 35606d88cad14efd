"""Progress on a terminal and elsewhere."""

import io
import re

import pytest
from rich.console import Console

from fp8kv.progress import ProgressBars


def console(*, terminal, width=80):
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        force_interactive=terminal,
        color_system=None,
        legacy_windows=False,
    )


def last_frame(shown):
    """Return the lines of the last drawing, without the codes that move the cursor."""
    text = re.sub(r"\x1b\[\?25[hl]", "", shown.file.getvalue())
    frame = re.split(r"(?:\x1b\[2K\x1b\[1A|\x1b\[1A\x1b\[2K|\x1b\[2K)+", text)[-1]
    return [line.strip() for line in re.sub(r"\r|\x1b\[[0-9;]*[A-Za-z]", "", frame).splitlines()]


def calibrate(bars):
    bars.stage("data")
    bars.advance(0, 16)
    bars.advance(16, 16)
    bars.stage("load")
    bars.stage("measure")
    bars.advance(1500, 2077)


def test_outside_a_terminal_a_stage_is_one_line():
    shown = console(terminal=False)
    bars = ProgressBars(shown)

    calibrate(bars)
    bars.stage("write")
    bars.stop()

    assert shown.file.getvalue() == "reading samples\nloading weights\nmeasuring tokens\nwriting\n"


def test_outside_a_terminal_a_task_is_one_line():
    shown = console(terminal=False)
    bars = ProgressBars(shown)

    for _ in range(3):
        bars.add("answers with bf16", 1, 3)
    bars.add("answers with [fp8]", 1, 3)
    bars.stop()

    assert shown.file.getvalue() == "answers with bf16\nanswers with [fp8]\n"


def test_on_a_terminal_bars_count():
    shown = console(terminal=True)
    bars = ProgressBars(shown)

    calibrate(bars)
    bars.stage("write")
    bars.stop()

    data, load, measure, write = last_frame(shown)
    assert "16/16" in data
    assert "1,500/2,077" in measure
    for uncounted in (load, write):
        assert "?" not in uncounted
        assert "/" not in uncounted
        assert uncounted.count("━") > 20
        assert re.search(r"\d:\d\d:\d\d$", uncounted), "finished: it says how long it took"


def test_a_stage_that_failed_leaves_no_full_bar():
    shown = console(terminal=True)
    bars = ProgressBars(shown)

    bars.stage("data")
    bars.advance(16, 16)
    bars.stage("load")
    bars.stop(complete=False)

    frame = last_frame(shown)
    assert any(line.startswith("reading samples") for line in frame)
    assert not any(line.startswith("loading weights") for line in frame)


def test_tasks_add_up():
    shown = console(terminal=True)
    bars = ProgressBars(shown)

    bars.add("answers with bf16", 0, 1319)
    bars.add("answers with bf16", 32, 1319)
    bars.add("answers with bf16", 1000, 1319)
    bars.stop()

    assert "1,032/1,319" in last_frame(shown)[0]


def test_nothing_is_drawn_before_the_first_stage():
    shown = console(terminal=True)
    bars = ProgressBars(shown)

    bars.advance(1, 2)
    bars.stop()

    assert shown.file.getvalue() == ""


@pytest.mark.parametrize("width", [80, 120])
def test_bars_fit_the_terminal(width):
    shown = console(terminal=True, width=width)
    bars = ProgressBars(shown)

    bars.stage("measure")
    bars.advance(123_456_789, 1_234_567_890)
    bars.stop()

    (line,) = last_frame(shown)
    assert "123,456,789/1,234,567,890" in line
    assert len(line) <= width


def test_without_a_console_it_is_silent(capsys):
    bars = ProgressBars(None)

    calibrate(bars)
    bars.add("x", 1, 2)
    bars.stop()

    assert capsys.readouterr() == ("", "")
