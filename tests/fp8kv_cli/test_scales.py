"""``fp8kv scales``: other scales from the same statistics."""

import json

import pytest

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.kv_names import find_kv_scales
from fp8kv.recipes import load_recipe


@pytest.fixture
def stats(minimax_out):
    return minimax_out / "fp8kv" / "kv-stats.safetensors"


def scale_values(result):
    return [layer["k"] + layer["v"] for layer in json.loads(result.stdout)["scales"]["layers"]]


def test_shows_the_verdicts_without_a_model(run, stats, minimax_source):
    result = run("scales", "--from", stats)

    assert (result.exit_code, result.stdout) == (0, "")
    assert f"KV cache of {minimax_source}, layers model.layers.*.self_attn" in result.stderr
    assert "all 12 streams are flat" in result.stderr


def test_json_is_what_calibrate_gave(run, stats, minimax_out):
    result = run("scales", "--from", stats, "--json")

    assert json.loads(result.stdout) == json.loads(
        (minimax_out / "fp8kv" / "calibration.json").read_text()
    )
    assert "absmax" not in result.stderr


def test_quiet_says_nothing(run, stats):
    result = run("scales", "--from", stats, "--quiet")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_each_option_changes_the_scales_as_it_says(run, stats):
    def scales(*options):
        return scale_values(run("scales", "--from", stats, "--json", *options))

    exact = scales("--exact")
    assert scales("--exact", "--headroom", "2") == [[2 * x for x in row] for row in exact]
    assert all(
        small < large
        for low, high in zip(
            scales("--exact", "--estimator", "percentile", "--percentile", "90"), exact, strict=True
        )
        for small, large in zip(low, high, strict=True)
    )
    assert {len(row) for row in scales("--granularity", "head")} == {2 * 2}
    data = json.loads(run("scales", "--from", stats, "--json", "--fp8-format", "e5m2").stdout)
    assert data["scales"]["fp8_format"] == "e5m2"


def test_the_recipe_is_read_and_the_command_line_wins(run, stats, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schema: 1\nname: mine\nscales: {headroom: 4.0, power_of_two: false}\n")
    options = ["--from", stats, "--json", "--recipe", recipe]

    exact = scale_values(run("scales", "--from", stats, "--json", "--exact"))
    assert scale_values(run("scales", *options)) == [[4 * x for x in row] for row in exact]
    assert scale_values(run("scales", *options, "--headroom", "1")) == exact


def test_writes_a_checkpoint_from_statistics(run, stats, minimax_source, tmp_path):
    out = tmp_path / "out"
    options = ["--model", minimax_source, "--out", out, "--headroom", "2", "--target", "vllm"]

    result = run("scales", "--from", stats, *options)

    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert f"  vllm serve {out} --kv-cache-dtype fp8\n" in result.stderr
    assert "sglang" not in result.stderr
    assert len(find_kv_scales(open_checkpoint(out))) == 12
    assert load_recipe(out / "fp8kv" / "recipe.yaml").scales.headroom == 2.0


def test_json_of_a_written_checkpoint_names_it(run, stats, minimax_source, tmp_path):
    out = tmp_path / "out"

    result = run("scales", "--from", stats, "--model", minimax_source, "--out", out, "--json")

    data = json.loads(result.stdout)
    assert data["out"] == str(out)
    assert [target["target"] for target in data["targets"]] == ["vllm", "sglang"]


def test_statistics_of_another_model_are_refused(run, stats, deepseek_source, tmp_path):
    out = tmp_path / "out"

    result = run("scales", "--from", stats, "--model", deepseek_source, "--out", out)

    assert result.exit_code == 3
    assert f"and {deepseek_source} is not that checkpoint" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("option", ["--model", "--out"])
def test_model_and_output_go_together(run, stats, option):
    result = run("scales", "--from", stats, option, "x")

    assert result.exit_code == 2
    assert "--model and --out go together" in result.stderr


def test_a_file_that_is_no_statistics_is_refused(run, tmp_path, minimax_out):
    result = run("scales", "--from", minimax_out / "config.json")

    assert result.exit_code == 3
    assert str(minimax_out / "config.json") in result.stderr


def test_granularity_head_does_not_exist_for_mla(run, deepseek_out):
    stats = deepseek_out / "fp8kv" / "kv-stats.safetensors"

    result = run("scales", "--from", stats, "--granularity", "head")

    assert result.exit_code == 3
    assert "'head' does not exist for MLA" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--headroom", "0"), ("--percentile", "101"), ("--percentile", "0")]
)
def test_values_out_of_range_are_usage_errors(run, stats, option, value):
    result = run("scales", "--from", stats, option, value)

    assert result.exit_code == 2
    assert option in result.stderr
