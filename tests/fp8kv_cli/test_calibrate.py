"""``fp8kv calibrate``: what it writes, says and passes on."""

import json

import pytest
import torch

from fp8kv.calibrate import pipeline
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.kv_names import find_kv_scales
from fp8kv.recipes import load_recipe
from fp8kv.recipes.errors import CalibrationError


@pytest.fixture
def calls(monkeypatch):
    """What the command hands to the pipeline; the pipeline itself stops at once."""
    made = []

    def stop(model, out, **keywords):
        made.append({"model": model, "out": str(out), **keywords})
        raise CalibrationError("stopped by the test")

    monkeypatch.setattr(pipeline, "calibrate", stop)
    return made


RECIPE = """
schema: 1
name: mine
data:
  sources: [{dataset: builtin:gsm-synth}]
  num_samples: 9
  seq_len: 40
  seed: 3
calibration: {batch_size: 2, dtype: float32}
scales: {estimator: mse, headroom: 1.25, power_of_two: false}
output: {targets: [vllm]}
"""


def test_writes_a_checkpoint_and_prints_its_path(run, tmp_path, minimax_source, tiny):
    out = tmp_path / "out"

    result = run("calibrate", minimax_source, "--out", out, *tiny)

    assert result.exit_code == 0
    assert result.stdout == f"{out}\n"
    assert len(find_kv_scales(open_checkpoint(out))) == 12
    assert f"vllm serve {out} --kv-cache-dtype fp8\n" in result.stderr
    assert f"sglang.launch_server --model-path {out}" in result.stderr
    assert "all 12 streams are flat" in result.stderr


def test_mla_says_that_the_engines_ignore_the_scales(run, tmp_path, deepseek_source, tiny):
    result = run("calibrate", deepseek_source, "--out", tmp_path / "out", *tiny)

    assert result.exit_code == 0
    rows = [line.split()[:2] for line in result.stderr.splitlines()]
    assert ["vllm", "ignored"] in rows
    assert ["sglang", "ignored"] in rows
    assert "--mode fold" in result.stderr


def test_json_is_all_of_stdout(run, tmp_path, minimax_source, tiny):
    out = tmp_path / "out"

    result = run("calibrate", minimax_source, "--out", out, *tiny, "--json")

    data = json.loads(result.stdout)
    assert data["out"] == str(out)
    assert data["samples"] == 8
    assert [layer["index"] for layer in data["scales"]["layers"]] == list(range(6))
    assert {target["target"]: target["loads"] for target in data["targets"]} == {
        "vllm": "loads",
        "sglang": "loads",
    }
    assert {verdict["verdict"] for verdict in data["verdicts"]} == {"flat"}
    assert "absmax" not in result.stderr, "no table beside JSON"


def test_quiet_says_nothing_but_the_path(run, tmp_path, minimax_source, tiny):
    out = tmp_path / "out"

    result = run("calibrate", minimax_source, "--out", out, *tiny, "--quiet")

    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{out}\n", "")


def test_progress_outside_a_terminal_is_one_line_a_stage(run, tmp_path, minimax_source, tiny):
    result = run("calibrate", minimax_source, "--out", tmp_path / "out", *tiny)

    lines = result.stderr.splitlines()
    assert lines[:4] == ["reading samples", "loading weights", "measuring tokens", "writing"]
    assert not {"\r", "\x1b", "%|"} & set(result.stderr)
    assert "Loading weights" not in result.stderr


def test_the_verdict_table_fits_80_columns(run, tmp_path, minimax_source, tiny):
    result = run("calibrate", minimax_source, "--out", tmp_path / "out", *tiny)

    lines = result.stderr.splitlines()
    title = lines.index("KV cache, layers model.layers.*.self_attn")
    header = [
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
    assert lines[title + 1].split() == header
    rows = [line.split() for line in lines[title + 3 : title + 15]]
    assert [row[:2] for row in rows] == [[str(n), s] for n in range(6) for s in ("K", "V")]
    assert max(map(len, lines[title : title + 15])) <= 80


def test_stats_only_writes_no_checkpoint(run, tmp_path, minimax_source, tiny):
    out = tmp_path / "out"

    result = run("calibrate", minimax_source, "--out", out, *tiny, "--stats-only")

    assert result.exit_code == 0
    files = sorted(path.name for path in out.iterdir())
    assert files == ["calibration.json", "kv-stats.safetensors", "recipe.yaml"]
    assert "serve it with" not in result.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(run, tmp_path, deepseek_source, tiny):
    result = run("calibrate", deepseek_source, "--out", tmp_path / "out", *tiny, "--dry-run")

    assert result.exit_code == 0
    assert "DeepseekV3ForCausalLM, mla" in result.stderr
    assert "LATENT, ROPE of 5 layers" in result.stderr
    assert "8 of at most 48 tokens" in result.stderr
    assert "builtin:gsm-synth" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cwd"]


def test_dry_run_needs_no_output_and_speaks_json(run, minimax_source, tiny):
    result = run("calibrate", minimax_source, *tiny, "--dry-run", "--json")

    plan = json.loads(result.stdout)
    assert plan["attention"] == "gqa"
    assert plan["streams"] == ["K", "V"]
    assert plan["layers"] == 6
    assert plan["tokens_at_most"] == 8 * 48
    assert plan["scale_tensors"] == 12
    assert plan["estimated_forward_seconds"] >= 0


def test_dry_run_refuses_an_output_that_exists(run, tmp_path, minimax_source):
    result = run("calibrate", minimax_source, "--out", tmp_path, "--dry-run")

    assert result.exit_code == 3
    assert f"error: {tmp_path} exists" in result.stderr


def test_without_an_output_it_is_a_usage_error(run, minimax_source):
    result = run("calibrate", minimax_source)

    assert result.exit_code == 2
    assert "--out DIR is needed" in result.stderr


@pytest.mark.parametrize(
    ("options", "section", "key", "expected"),
    [
        (["--num-samples", "7"], "data", "num_samples", 7),
        (["--seq-len", "33"], "data", "seq_len", 33),
        (["--seed", "5"], "data", "seed", 5),
        (["--batch-size", "4"], "calibration", "batch_size", 4),
        (["--dtype", "float16"], "calibration", "dtype", "float16"),
        (["--estimator", "percentile"], "scales", "estimator", "percentile"),
        (["--percentile", "99.5"], "scales", "percentile", 99.5),
        (["--headroom", "2"], "scales", "headroom", 2.0),
        (["--exact"], "scales", "power_of_two", False),
        (["--power-of-two"], "scales", "power_of_two", True),
        (["--granularity", "head"], "scales", "granularity", "head"),
        (["--fp8-format", "e5m2"], "scales", "fp8_format", "e5m2"),
        (
            ["--target", "modelopt", "--target", "vllm"],
            "output",
            "targets",
            ("modelopt", "vllm"),
        ),
    ],
)
def test_every_option_reaches_the_recipe(
    run, tmp_path, minimax_source, calls, options, section, key, expected
):
    run("calibrate", minimax_source, "--out", tmp_path / "out", *options)

    (call,) = calls
    assert getattr(getattr(call["recipe"], section), key) == expected


def test_datasets_reach_the_recipe_with_their_parts(run, tmp_path, minimax_source, calls):
    first = "openai/gsm8k,config=main,split=test,weight=2"
    run("calibrate", minimax_source, "--out", tmp_path / "out", "--dataset", first)
    second = ["--dataset", first, "--dataset", "notes.jsonl,column=body"]
    run("calibrate", minimax_source, "--out", tmp_path / "out", *second)

    one, two = (call["recipe"].data.sources for call in calls)
    assert (one[0].dataset, one[0].config, one[0].split, one[0].weight) == (
        "openai/gsm8k",
        "main",
        "test",
        2.0,
    )
    assert two[0] == one[0]
    assert (two[1].dataset, two[1].column, two[1].weight) == ("notes.jsonl", "body", 1.0)


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ([], "device", "auto"),
        (["--device", "cpu"], "device", "cpu"),
        ([], "link", "auto"),
        (["--link", "copy"], "link", "copy"),
        ([], "trust_remote_code", False),
        (["--trust-remote-code"], "trust_remote_code", True),
        ([], "stats_only", False),
        (["--stats-only"], "stats_only", True),
    ],
)
def test_options_of_the_run_reach_the_pipeline(
    run, tmp_path, minimax_source, calls, options, key, expected
):
    run("calibrate", minimax_source, "--out", tmp_path / "out", *options)

    assert calls[0][key] == expected
    assert calls[0]["model"] == str(minimax_source)


def test_command_line_wins_over_recipe_and_recipe_over_default(run, tmp_path, minimax_source):
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    options = ["--num-samples", "8", "--estimator", "absmax"]

    result = run("calibrate", minimax_source, "--out", out, "--recipe", recipe, *options)

    assert result.exit_code == 0
    resolved = load_recipe(out / "fp8kv" / "recipe.yaml")
    assert (resolved.data.num_samples, resolved.scales.estimator) == (8, "absmax")
    assert (resolved.data.seq_len, resolved.data.seed, resolved.scales.headroom) == (40, 3, 1.25)
    assert resolved.scales.power_of_two is False
    assert resolved.output.targets == ("vllm",)
    assert (resolved.scales.percentile, resolved.scales.granularity) == (99.99, "tensor")


def test_two_seeds_draw_other_samples_and_one_seed_the_same(run, tmp_path, minimax_source, tiny):
    def digest(name, seed):
        options = [*tiny, "--seed", seed, "--stats-only", "--json"]
        data = json.loads(
            run("calibrate", minimax_source, "--out", tmp_path / name, *options).stdout
        )
        return [verdict["absmax"] for verdict in data["verdicts"]]

    assert digest("a", 1) == digest("b", 1)
    assert digest("c", 2) != digest("d", 1)


def test_a_fitting_recipe_is_named_and_used(run, tmp_path, minimax_source, calls, monkeypatch):
    monkeypatch.setattr(
        "fp8kv.recipes.find_recipe_for", lambda config, source: "minimax-m2" if source else None
    )

    result = run("calibrate", minimax_source, "--out", tmp_path / "out")

    assert "recipe minimax-m2 fits this model; --recipe names another" in result.stderr
    assert calls[0]["recipe"].name == "minimax-m2"


def test_interrupted_it_says_that_it_goes_on(run, tmp_path, minimax_source, monkeypatch):
    def interrupt(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "calibrate", interrupt)

    result = run("calibrate", minimax_source, "--out", tmp_path / "out")

    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith(
        f"interrupted; {tmp_path / 'out'} was not made"
    )
    assert "last snapshot" in result.stderr


def test_scales_that_are_written_hold_what_was_measured(run, tmp_path, minimax_source, tiny):
    out = tmp_path / "out"

    data = json.loads(run("calibrate", minimax_source, "--out", out, *tiny, "--json").stdout)

    stored = {
        (found.layer, found.stream): found.value for found in find_kv_scales(open_checkpoint(out))
    }
    for verdict in data["verdicts"]:
        scale = stored[verdict["layer"], verdict["stream"].lower()]
        assert scale.dtype == torch.float32
        # a power of two, and the smallest that holds the largest value
        assert scale.item() * 448 >= verdict["absmax"] > scale.item() / 2 * 448
