"""``fp8kv stats merge``."""

import json

import pytest

from fp8kv.calibrate.stats_file import load_statistics


@pytest.fixture(scope="module")
def parts(tmp_path_factory, minimax_source):
    """Statistics of two different samples of one model."""
    from click.testing import CliRunner

    from fp8kv.main import cli

    root = tmp_path_factory.mktemp("parts")
    for seed in ("1", "2"):
        arguments = ["calibrate", str(minimax_source), "--out", str(root / seed), "--stats-only"]
        arguments += ["--dataset", "builtin:gsm-synth", "--num-samples", "4", "--seq-len", "32"]
        result = CliRunner().invoke(cli, [*arguments, "--seed", seed], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    return [root / seed / "kv-stats.safetensors" for seed in ("1", "2")]


def test_merge_adds_the_data_up(run, parts, tmp_path):
    out = tmp_path / "merged.safetensors"

    result = run("stats", "merge", *parts, "--out", out)

    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert "of 8 samples from 2 files" in result.stderr
    merged = load_statistics(out)
    loaded = [load_statistics(part) for part in parts]
    assert merged.tokens.sum() == sum(stats.tokens.sum() for stats in loaded)
    for layer, one, other in zip(merged.layers, *(s.layers for s in loaded), strict=True):
        for name, stream in layer.streams.items():
            both = one.streams[name].absmax.maximum(other.streams[name].absmax)
            assert stream.absmax.equal(both)


def test_merge_does_not_depend_on_the_order(run, parts, tmp_path):
    run("stats", "merge", *parts, "--out", tmp_path / "a")
    run("stats", "merge", *reversed(parts), "--out", tmp_path / "b")

    first, second = (run("scales", "--from", tmp_path / name, "--json").stdout for name in "ab")
    assert json.loads(first) == json.loads(second)


def test_merge_json_and_quiet(run, parts, tmp_path):
    result = run("stats", "merge", *parts, "--out", tmp_path / "merged", "--json", "--quiet")

    data = json.loads(result.stdout)
    assert data["out"] == str(tmp_path / "merged")
    assert data["samples"] == 8
    assert data["tokens"] > 0
    assert result.stderr == ""


def test_merge_of_the_same_data_is_refused(run, parts, tmp_path):
    result = run("stats", "merge", parts[0], parts[0], "--out", tmp_path / "merged")

    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "merged").exists()


def test_merge_of_different_models_is_refused(run, parts, deepseek_out, tmp_path):
    other = deepseek_out / "fp8kv" / "kv-stats.safetensors"

    result = run("stats", "merge", parts[0], other, "--out", tmp_path / "merged")

    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "merged").exists()


def test_merge_never_overwrites(run, parts, tmp_path):
    out = tmp_path / "there"
    out.write_text("mine")

    result = run("stats", "merge", *parts, "--out", out)

    assert result.exit_code == 3
    assert f"error: {out} exists" in result.stderr
    assert out.read_text() == "mine"


def test_merge_needs_two_files(run, parts, tmp_path):
    result = run("stats", "merge", parts[0], "--out", tmp_path / "merged")

    assert result.exit_code == 2
    assert "at least two" in result.stderr
