"""``fp8kv demo``, with few problems."""

import json

import pytest

from fp8kv.commands import demo
from fp8kv.demo import MODELS


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    monkeypatch.setattr(demo, "_NUM_SAMPLES", 8)
    monkeypatch.setattr(demo, "_SEQ_LEN", 64)


@pytest.fixture
def without_eval(monkeypatch):
    """Calibrate, write and validate, but answer no questions."""

    class Report:
        def to_json(self):
            return {"arms": {}}

    monkeypatch.setattr(demo, "_evaluate", lambda *_: Report())
    monkeypatch.setattr(
        "fp8kv.runtime.evaluation.eval_markdown.to_markdown", lambda _: "### the report"
    )


def test_writes_both_checkpoints_and_says_what_to_do_next(run, tmp_path, without_eval):
    out = tmp_path / "out"

    result = run("demo", "--out", out)

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [str(out / name) for name in MODELS]
    for name in MODELS:
        assert f"== {name} ==" in result.stderr
        assert (out / name / "model-kv-scales.safetensors").exists()
    assert result.stderr.count("checks, 0 findings") == 2
    assert result.stderr.count("### the report") == 2
    assert f"fp8kv inspect {out / 'tiny-minimax-m2'}" in result.stderr


def test_takes_the_next_free_name(run, without_eval):
    first, second = run("demo", "--quiet"), run("demo", "--quiet")

    assert first.stdout.splitlines()[0] == "fp8kv-demo/tiny-minimax-m2"
    assert second.stdout.splitlines()[0] == "fp8kv-demo-2/tiny-minimax-m2"
    assert first.stderr == second.stderr == ""


def test_an_output_that_exists_is_an_error(run, tmp_path, without_eval):
    (tmp_path / "out" / "tiny-minimax-m2").mkdir(parents=True)

    result = run("demo", "--out", tmp_path / "out")

    assert result.exit_code == 3
    assert f"error: {tmp_path / 'out' / 'tiny-minimax-m2'} exists" in result.stderr


@pytest.mark.slow
def test_all_of_it_on_two_problems(run, tmp_path):
    result = run("demo", "--out", tmp_path / "out", "--limit", "2", "--json", "--quiet")

    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert set(data["models"]) == set(MODELS)
    for model in data["models"].values():
        assert model["findings"] == 0
        assert model["checks"] > 10
        report = model["eval"]["sections"]["gsm8k"]
        assert report["n"] == 2
        assert list(report["arms"]) == ["bf16", "fp8-unit", "fp8"]
        # the models are trained to answer; the cache at calibrated scales changes next to nothing
        assert report["arms"]["bf16"]["strict"]["value"] == 1.0
        assert report["arms"]["fp8"]["agreement"]["kl"] < 1e-4
