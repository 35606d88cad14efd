"""The program as a whole: help, exit statuses, errors, interruptions."""

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import fp8kv
from fp8kv.main import cli
from fp8kv.recipes.errors import CheckpointError, Fp8kvError

COMMANDS = [
    "demo",
    "calibrate",
    "scales",
    "stats",
    "validate",
    "inspect",
    "eval",
    "serve",
    "strip",
    "recipes",
]


def program(*arguments, **keywords):
    # -P: the current directory is not searched, which may hold folders of our names
    command = [sys.executable, "-P", "-m", "fp8kv", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **keywords)


def raising(error):
    """Return a command line whose only command raises ``error``."""

    @click.command("fail")
    def fail():
        raise error

    group = type(cli)("fp8kv", params=cli.params)
    group.add_command(fail)
    return group


def test_python_m_is_the_same_program():
    result = program("--version")

    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        f"fp8kv {fp8kv.__version__}\n",
        "",
    )


def test_help_lists_the_commands_in_the_order_of_work(run):
    for option in ("-h", "--help"):
        result = run(option)
        assert result.exit_code == 0
        listed = result.stdout.partition("Commands:\n")[2].splitlines()
        assert [line.split()[0] for line in listed] == COMMANDS
        assert not any(line.endswith("...") for line in listed)


def test_help_shows_its_examples_line_by_line(run):
    lines = run("--help").stdout.splitlines()

    assert any(line.startswith("  fp8kv calibrate MODEL --out DIR ") for line in lines)
    assert not any("\\b" in line for line in lines)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("stats", "recipes")])
def test_every_command_has_json_and_quiet(run, command):
    options = run(command, "--help").stdout

    # a server's answers go over HTTP
    assert ("--json" in options) == (command != "serve")
    assert "--quiet" in options


@pytest.mark.parametrize("command", ["eval", "serve"])
def test_every_option_is_explained_and_its_default_true(run, command):
    from fp8kv.runtime.limits import MAX_BATCH_TOKENS, MAX_SEQUENCES

    options = [one for one in cli.commands[command].params if isinstance(one, click.Option)]
    assert not [one.name for one in options if not one.help]
    defaults = {one.name: one.help.partition("[default: ")[2].rstrip("]") for one in options}
    assert defaults["max_sequences"] == str(MAX_SEQUENCES)
    assert defaults["max_batch_tokens"] == str(MAX_BATCH_TOKENS)
    if command == "serve":
        settings = pytest.importorskip("fp8kv.runtime.server.settings")
        assert defaults["max_queue"] == str(settings.MAX_QUEUE)
        assert defaults["max_body_bytes"] == str(settings.MAX_BODY_BYTES)
        assert float(defaults["shutdown_seconds"]) == settings.SHUTDOWN_SECONDS


def test_an_error_is_one_sentence_and_status_3():
    result = CliRunner().invoke(raising(CheckpointError("x is broken; mend it")), ["fail"])

    assert (result.exit_code, result.stderr) == (3, "error: x is broken; mend it\n")
    assert isinstance(result.exception, SystemExit)


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(raising(CheckpointError("x is broken")), ["--debug", "fail"])

    assert isinstance(result.exception, Fp8kvError)


def test_a_bug_keeps_its_traceback():
    result = CliRunner().invoke(raising(KeyError("oops")), ["fail"])

    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_interrupted_is_status_130_and_promises_nothing(error):
    result = CliRunner().invoke(raising(error), ["fail"])

    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_an_unknown_command_is_a_usage_error_with_a_suggestion(run):
    result = run("calibrat")

    assert result.exit_code == 2
    assert "'calibrate'" in result.stderr


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-P", "-m", "fp8kv", "recipes", "list", "--json"]
    try:
        result = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(write)

    assert (result.returncode, result.stderr) == (141, "")


def test_head_gets_its_line():
    command = f"{sys.executable} -P -m fp8kv recipes list | head -1"

    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)

    assert (result.stdout, result.stderr) == ("deepseek-r1\n", "")


def test_errors_have_no_colour_where_none_is_wanted():
    result = program("inspect", "nothing-here", env={**os.environ, "NO_COLOR": "1"})

    assert result.returncode == 3
    assert result.stderr.startswith("error: nothing-here does not exist")
    assert "\x1b" not in result.stderr
