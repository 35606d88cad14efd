"""``fp8kv validate``: one line per check, and the exit status."""

import json

import pytest
import safetensors.torch
import torch

from fp8kv.calibrate.validation.validate import describe_checks


def set_scale(directory, name, value):
    path = directory / "model-kv-scales.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert name in tensors
    tensors[name] = torch.tensor([value])
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def test_a_converted_checkpoint_is_clean(run, minimax_out):
    result = run("validate", minimax_out)

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok   ") for line in lines)
    assert any(line.startswith("ok   plausible: 6 layers against the statistics") for line in lines)
    assert result.stderr == f"{len(lines)} checks, 0 findings\n"


def test_json_has_every_check(run, deepseek_out):
    result = run("validate", deepseek_out, "--json")

    data = json.loads(result.stdout)
    assert data["directory"] == str(deepseek_out)
    assert {"opens", "mla-k-equals-v", "base-untouched"} <= {c["name"] for c in data["checks"]}
    assert all(check["passed"] and check["detail"] for check in data["checks"])


def test_quiet_gives_the_exit_status_alone(run, minimax_out, minimax_source):
    clean, bare = run("validate", minimax_out, "-q"), run("validate", minimax_source, "-q")

    assert (clean.exit_code, clean.stdout, clean.stderr) == (0, "", "")
    assert (bare.exit_code, bare.stdout, bare.stderr) == (1, "", "")


@pytest.mark.parametrize(
    ("value", "finding"),
    [
        (float("nan"), "finite: model.layers.2.self_attn.k_scale is nan"),
        (-1.0, "positive: model.layers.2.self_attn.k_scale is -1"),
        (0.1, "bfloat16-representable: model.layers.2.self_attn.k_scale is 0.1"),
        (2.0**-12, "plausible: "),
    ],
)
def test_a_finding_gives_status_1_and_its_line(run, minimax_copy, value, finding):
    set_scale(minimax_copy, "model.layers.2.self_attn.k_scale", value)

    result = run("validate", minimax_copy)

    assert result.exit_code == 1
    assert any(line.startswith(f"FAIL {finding}") for line in result.stdout.splitlines())


def test_findings_are_in_the_json_too(run, minimax_copy):
    set_scale(minimax_copy, "model.layers.0.self_attn.v_scale", float("inf"))

    result = run("validate", minimax_copy, "--json")

    assert result.exit_code == 1
    failed = [check for check in json.loads(result.stdout)["checks"] if not check["passed"]]
    assert "finite" in {check["name"] for check in failed}


def test_what_does_not_open_is_one_finding(run, tmp_path):
    result = run("validate", tmp_path / "nothing")

    assert result.exit_code == 1
    assert result.stdout.startswith("FAIL opens: ")
    assert len(result.stdout.splitlines()) == 1


def test_help_lists_every_check(run):
    result = run("validate", "--help")

    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for name, description in describe_checks():
        assert f" {name} {description}" in text
