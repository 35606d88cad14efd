"""``fp8kv strip``."""

import json

import pytest

from fp8kv.calibrate.stats_file import load_statistics


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def statistics(minimax_copy):
    return minimax_copy / "fp8kv" / "kv-stats.safetensors"


def test_restores_the_source_byte_for_byte(run, minimax_copy, minimax_source):
    result = run("strip", minimax_copy)

    assert (result.exit_code, result.stdout) == (0, f"{minimax_copy}\n")
    assert "restored " in result.stderr
    assert "config.json" in result.stderr
    assert files_of(minimax_copy) == files_of(minimax_source)
    assert not (minimax_copy / "fp8kv").exists()


def test_warns_that_the_statistics_go(run, minimax_copy, statistics):
    result = run("strip", minimax_copy)

    assert f"warning: {statistics} is deleted too; --keep-stats FILE keeps it" in result.stderr


def test_keep_stats_moves_them_out_first(run, minimax_copy, statistics, tmp_path):
    before, kept = statistics.read_bytes(), tmp_path / "kept.safetensors"

    result = run("strip", minimax_copy, "--keep-stats", kept)

    assert result.exit_code == 0
    assert "warning" not in result.stderr
    assert f"the statistics are in {kept}" in result.stderr
    assert kept.read_bytes() == before
    assert len(load_statistics(kept).layers) == 6
    assert not statistics.exists()


def test_keep_stats_never_overwrites(run, minimax_copy, statistics, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("mine")

    result = run("strip", minimax_copy, "--keep-stats", kept)

    assert result.exit_code == 3
    assert f"error: {kept} exists" in result.stderr
    assert kept.read_text() == "mine"
    assert statistics.exists()


def test_keep_stats_of_a_directory_without_any(run, minimax_source, tmp_path):
    result = run("strip", minimax_source, "--keep-stats", tmp_path / "kept")

    assert result.exit_code == 3
    assert "leave out --keep-stats" in result.stderr
    assert not (tmp_path / "kept").exists()


def test_where_stripping_is_refused_no_copy_stays(run, minimax_copy, statistics, tmp_path):
    (minimax_copy / "config.json").write_text("{}")

    result = run("strip", minimax_copy, "--keep-stats", tmp_path / "kept")

    assert result.exit_code == 3
    assert "was changed after fp8kv wrote it" in result.stderr
    assert not (tmp_path / "kept").exists()
    assert statistics.exists()


def test_somebody_at_a_terminal_may_say_no(run, minimax_copy, statistics, monkeypatch):
    monkeypatch.setattr("fp8kv.commands.strip.sys", _TerminalInput())

    result = run("strip", minimax_copy)  # the runner's input is empty, which is no yes

    assert result.exit_code == 130
    assert "go on?" in result.stderr
    assert result.stderr.endswith("interrupted\n")
    assert statistics.exists()


@pytest.mark.parametrize("option", ["--yes", "--quiet"])
def test_nobody_is_asked_who_said_so(run, minimax_copy, statistics, monkeypatch, option):
    monkeypatch.setattr("fp8kv.commands.strip.sys", _TerminalInput())

    result = run("strip", minimax_copy, option)

    assert result.exit_code == 0
    assert not statistics.exists()


def test_json_and_quiet(run, minimax_copy, tmp_path):
    kept = tmp_path / "kept"

    result = run("strip", minimax_copy, "--keep-stats", kept, "--json", "--quiet")

    data = json.loads(result.stdout)
    assert data["directory"] == str(minimax_copy)
    assert data["statistics"] == str(kept)
    assert "model-kv-scales.safetensors" in data["removed"]
    assert "config.json" in data["restored"]
    assert result.stderr == ""


def test_a_checkpoint_without_scales_is_an_error(run, minimax_source):
    before = files_of(minimax_source)

    result = run("strip", minimax_source)

    assert result.exit_code == 3
    assert "there is nothing to strip" in result.stderr
    assert files_of(minimax_source) == before


class _TerminalInput:
    """Stands in for the module ``sys`` of the command."""

    class stdin:
        @staticmethod
        def isatty():
            return True
