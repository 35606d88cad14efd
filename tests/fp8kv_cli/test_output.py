"""What goes to stdout and what to stderr."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from fp8kv import output as output_module
from fp8kv.output import Output
from fp8kv.tables import VERDICT_COLUMNS, VERDICT_LEGEND, verdict_rows


def draw(monkeypatch, width=80, *, terminal=False, **keywords):
    """Return the file that tables go to, and let it be a console of this width."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, highlight=False, **keywords)
    monkeypatch.setattr(output_module, "_console", lambda: console)
    return file


def quality(error, clipped=0.0):
    return SimpleNamespace(relative_error=error, sqnr_db=31.53, clipped=clipped)


def verdicts(layers):
    """Verdicts with the widest values that occur."""
    return [
        SimpleNamespace(
            layer=f"language_model.model.layers.{layer}.self_attn",
            stream=stream,
            verdict="underflow" if layer % 2 else "clip",
            absmax=12345.678,
            scale=2.0**-13,
            at_unit=quality(10.0),
            at_scale=quality(0.02654),
            held_out=quality(0.0265, clipped=1.234e-05),
        )
        for layer in range(layers)
        for stream in ("LATENT", "ROPE")
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_widest_verdict_table_wraps_no_word(monkeypatch, width):
    file = draw(monkeypatch, width)

    Output().table("t", VERDICT_COLUMNS, verdict_rows(verdicts(128)), VERDICT_LEGEND)

    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert lines[1].split() == [
        "layer",
        "stream",
        "absmax",
        "at",
        "1.0",
        "error",
        "scale",
        "error",
        "SQNR",
        "clipped",
    ]
    rows = [line.split() for line in lines[3:259]]
    assert rows[0] == [
        *("0", "LATENT", "1.235e+04", "clip", "1000.00%", "0.0001221", "2.65%", "31.5", "1.2e-05")
    ]
    assert [row[0] for row in rows] == [str(layer) for layer in range(128) for _ in range(2)]


def test_numbers_align_right_and_words_left(monkeypatch):
    file = draw(monkeypatch)

    Output().table("t", ["word", "number"], [["a", "1"], ["bb", "22.5"], ["c", "-"]])

    assert [line.rstrip() for line in file.getvalue().splitlines()[3:6]] == [
        "a          1",
        "bb      22.5",
        "c          -",
    ]


def test_a_title_is_not_broken(monkeypatch):
    file = draw(monkeypatch)
    title = "KV cache of /a/very/long/path/" + "x" * 100

    Output().table(title, ["a"], [["1"]])

    assert file.getvalue().splitlines()[0] == title


def test_names_are_not_taken_for_markup(monkeypatch):
    file = draw(monkeypatch)

    Output().table("[red]t[/red]", ["a"], [["[bold]x[/bold]"], [":smile:"]])

    assert "[red]t[/red]" in file.getvalue()
    assert "[bold]x[/bold]" in file.getvalue()
    assert ":smile:" in file.getvalue()


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file = draw(monkeypatch, terminal=True)
    Output().table("t", ["verdict"], [["clip"]])
    assert "\x1b[31m" not in file.getvalue()
    assert "31m" not in file.getvalue()

    monkeypatch.delenv("NO_COLOR")
    file = draw(monkeypatch, terminal=True, color_system="standard")
    Output().table("t", ["verdict"], [["clip"], ["flat"]])
    assert file.getvalue().count("31m") == 1, "red, where colours are wanted, and nothing else"


@pytest.mark.parametrize("options", [{"quiet": True}, {"as_json": True}])
def test_no_table_when_quiet_or_json(monkeypatch, options):
    file = draw(monkeypatch)

    Output(**options).table("t", ["a"], [["1"]])

    assert file.getvalue() == ""


def test_talk_data_and_json_go_where_they_belong(capsys):
    for options in ({}, {"quiet": True}, {"as_json": True}):
        output = Output(**options)
        output.say(f"say {options}")
        output.data(f"data {options}")
        output.json({"json": sorted(options)})

    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["say {}", "say {'as_json': True}"]
    *data, rest = captured.out.split("\n", 2)
    assert data == ["data {}", "data {'quiet': True}"]
    assert json.loads(rest) == {"json": ["as_json"]}


def test_json_has_no_nan(capsys):
    Output(as_json=True).json({"a": (float("nan"), 1.5), "b": {"c": float("-inf")}})

    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}}


def test_while_work_is_shown_stdout_is_kept_clean(capsys):
    with Output(as_json=True).progress():
        sys.stdout.write("from a library\n")

    assert capsys.readouterr() == ("", "from a library\n")


@pytest.fixture
def talkative():
    """Transformers' own logging module, with everything on."""
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    yield logging
    logging.set_verbosity(before[0])
    (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


@pytest.mark.parametrize("error", [None, KeyError])
def test_libraries_are_quiet_only_meanwhile(talkative, error):
    with contextlib.suppress(KeyError), Output(quiet=True).progress():
        assert talkative.get_verbosity() == talkative.ERROR
        assert not talkative.is_progress_bar_enabled()
        if error is not None:
            raise error

    assert talkative.get_verbosity() == talkative.INFO
    assert talkative.is_progress_bar_enabled()


def test_libraries_that_were_quiet_stay_quiet(talkative):
    talkative.disable_progress_bar()

    with Output(quiet=True).progress():
        pass

    assert not talkative.is_progress_bar_enabled()
