"""Fixtures of the command-line tests: a runner, and the embedded models converted once."""

import os
import shutil

import pytest
from click.testing import CliRunner

from fp8kv.demo import MODELS
from fp8kv.main import cli

TINY = ("--dataset", "builtin:gsm-synth", "--num-samples", "8", "--seq-len", "48")
"""Options that make a calibration take a second."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``fp8kv`` with arguments in an empty directory; what is a bug keeps its traceback."""
    directory = tmp_path / "cwd"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "80")
    return _run


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture(scope="session")
def minimax_source():
    return MODELS["tiny-minimax-m2"]


@pytest.fixture(scope="session")
def deepseek_source():
    return MODELS["tiny-deepseek-v3"]


@pytest.fixture(scope="session")
def minimax_out(tmp_path_factory, minimax_source):
    """A converted GQA checkpoint, not to be changed."""
    return _convert(minimax_source, tmp_path_factory.mktemp("converted") / "minimax")


@pytest.fixture(scope="session")
def deepseek_out(tmp_path_factory, deepseek_source):
    """A converted MLA checkpoint, not to be changed."""
    return _convert(deepseek_source, tmp_path_factory.mktemp("converted") / "deepseek")


@pytest.fixture
def minimax_copy(tmp_path, minimax_out):
    """A converted checkpoint to change: shards are linked, all else is copied."""
    return shutil.copytree(minimax_out, tmp_path / "copy", copy_function=_link_shards)


def _run(*arguments):
    return CliRunner().invoke(
        cli, [str(argument) for argument in arguments], catch_exceptions=False
    )


def _convert(source, out):
    result = _run("calibrate", source, "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    return out


def _link_shards(source, destination):
    linked = "-of-" in os.path.basename(source)
    return os.link(source, destination) if linked else shutil.copy2(source, destination)
