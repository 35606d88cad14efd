"""``fp8kv inspect`` on our own and on foreign checkpoints."""

import json

import safetensors.torch
import torch


def test_lists_the_scales_of_a_converted_checkpoint(run, minimax_out):
    result = run("inspect", minimax_out)

    assert (result.exit_code, result.stdout) == (0, "6 layers, nothing suspicious\n")
    lines = result.stderr.splitlines()
    assert lines[0] == f"KV scales of {minimax_out} (gqa), layers model.layers.*.self_attn"
    rows = [line.split() for line in lines[3:9]]
    assert [row[:2] for row in rows] == [[str(layer), "{k,v}_scale"] for layer in range(6)]
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)


def test_json_has_the_rows_and_nothing_else(run, deepseek_out):
    result = run("inspect", deepseek_out, "--json")

    data = json.loads(result.stdout)
    assert data["model"] == str(deepseek_out)
    assert data["attention"] == "mla"
    assert data["flags"] == []
    assert [row["layer"] for row in data["rows"]] == [
        f"model.layers.{layer}.self_attn" for layer in range(5)
    ]
    assert all(row["k"] == row["v"] for row in data["rows"])
    assert result.stderr == ""


def test_a_checkpoint_without_scales_says_what_that_means(run, minimax_source):
    result = run("inspect", minimax_source)

    assert result.exit_code == 0
    assert result.stdout.startswith("no-scales: ")
    assert "scale 1.0" in result.stdout
    assert result.stderr == "", "no empty table"


def test_foreign_scales_are_listed_and_flagged(run, tmp_path, minimax_copy):
    path = minimax_copy / "model-kv-scales.safetensors"
    names = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: torch.ones(1) for name in names}, path)

    result = run("inspect", minimax_copy)

    assert result.exit_code == 0
    assert "all-one: every scale is 1" in result.stdout


def test_a_scale_that_is_nan_is_shown_and_null_in_json(run, minimax_copy):
    path = minimax_copy / "model-kv-scales.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([float("nan")])
    safetensors.torch.save_file(tensors, path)

    shown, data = run("inspect", minimax_copy), run("inspect", minimax_copy, "--json")

    assert "nan" in shown.stderr
    assert "out-of-range" in shown.stdout
    row = json.loads(data.stdout)["rows"][0]
    assert row["k"] == [None, None]
    assert "out-of-range" in row["flags"]


def test_quiet_leaves_the_findings(run, minimax_out):
    result = run("inspect", minimax_out, "--quiet")

    assert (result.stdout, result.stderr) == ("6 layers, nothing suspicious\n", "")


def test_what_is_no_checkpoint_is_an_error(run, tmp_path):
    result = run("inspect", tmp_path / "nothing")

    assert result.exit_code == 3
    assert result.stderr.startswith(f"error: {tmp_path / 'nothing'} does not exist")
