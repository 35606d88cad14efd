"""``fp8kv eval``: arms, output and refusals."""

import json

import pytest

from fp8kv.demo import TEST_DATA
from fp8kv.runtime import gsm8k_eval
from fp8kv.runtime.eval_report import EvalReport

FAST = ("--num-fewshot", "1", "--max-new-tokens", "16", "--device", "cpu")
"""Too short for an answer, which is all the same to the command."""


@pytest.fixture
def data(tmp_path):
    """Three problems."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(TEST_DATA.read_text().splitlines(keepends=True)[:3]))
    return path


@pytest.fixture
def calls(monkeypatch):
    """What the command hands to the evaluation, which is interrupted at once."""
    made = []

    def stop(model, questions, **keywords):
        made.append({"model": model, "questions": questions, **keywords})
        raise KeyboardInterrupt

    monkeypatch.setattr(gsm8k_eval, "evaluate_gsm8k", stop)
    return made


def test_prints_markdown_on_stdout_and_progress_on_stderr(run, minimax_out, data):
    result = run("eval", minimax_out, "--data", data, "--limit", "2", *FAST)

    assert result.exit_code == 0
    assert result.stdout.startswith(f"### GSM8K by KV cache: `{minimax_out}`")
    assert f"2 problems of `{data}`, 1-shot, greedy, at most 16 new tokens" in result.stdout
    rows = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line[:1] == "|"]
    assert rows[2:5] == ["bf16 (unquantised)", "fp8-unit (scale 1.0)", "fp8 (calibrated scales)"]
    assert result.stderr.splitlines() == [
        "reference answers, all arms",
        "answers with bf16",
        "answers with fp8-unit",
        "answers with fp8",
    ]


def test_json_is_a_report(run, minimax_out, data):
    options = ["--data", data, "--shots", data, "--limit", "1", *FAST, "--arms", "bf16", "--quiet"]

    result = run("eval", minimax_out, *options, "--json")

    report = EvalReport.from_json(json.loads(result.stdout))
    assert (report.n, report.num_fewshot, report.max_new_tokens) == (1, 1, 16)
    assert list(report.arms) == ["bf16"]
    assert result.stderr == ""


def test_two_arms_run_on_an_unconverted_checkpoint(run, minimax_source, data):
    options = ["--data", data, "--limit", "1", *FAST, "--arms", "bf16,fp8-unit", "--json"]

    result = run("eval", minimax_source, *options)

    assert result.exit_code == 0
    assert list(json.loads(result.stdout)["arms"]) == ["bf16", "fp8-unit"]


def test_the_default_arms_need_scales(run, minimax_source, data):
    result = run("eval", minimax_source, "--data", data, *FAST)

    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {minimax_source} carries no KV scales: convert it with fp8kv calibrate, "
        "or leave the arm 'fp8' out\n"
    )


@pytest.mark.parametrize(
    ("arms", "complaint"),
    [
        ("bf16,fp9", "'fp9' is no arm; known: bf16, fp8-unit, fp8"),
        ("", "'' is no arm"),
        ("bf16,", "'' is no arm"),
        ("fp8,fp8", "an arm is named twice"),
    ],
)
def test_unknown_arms_are_usage_errors(run, minimax_source, data, arms, complaint):
    result = run("eval", minimax_source, "--data", data, "--arms", arms)

    assert result.exit_code == 2
    assert f"Invalid value for '--arms': {complaint}" in result.stderr


@pytest.mark.parametrize("options", [[], ["--gsm8k", "--data", "x.jsonl"]])
def test_it_must_be_said_what_to_evaluate_on(run, minimax_source, options):
    result = run("eval", minimax_source, *options)

    assert result.exit_code == 2
    assert "either --gsm8k or --data FILE" in result.stderr


def test_gsm8k_has_its_own_shots(run, minimax_source, data):
    result = run("eval", minimax_source, "--gsm8k", "--shots", data)

    assert result.exit_code == 2
    assert "--shots goes with --data" in result.stderr


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ([], "limit", None),
        (["--limit", "2"], "limit", 2),
        ([], "num_fewshot", 5),
        (["--num-fewshot", "0"], "num_fewshot", 0),
        ([], "max_new_tokens", 256),
        (["--max-new-tokens", "9"], "max_new_tokens", 9),
        ([], "arms", ["bf16", "fp8-unit", "fp8"]),
        (["--arms", "fp8, bf16"], "arms", ["fp8", "bf16"]),
        ([], "batch_size", 32),
        (["--batch-size", "3"], "batch_size", 3),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--fp8-format", "e5m2"], "fp8_format", "e5m2"),
        (["--trust-remote-code"], "trust_remote_code", True),
    ],
)
def test_every_option_reaches_the_evaluation(
    run, minimax_source, data, calls, options, key, expected
):
    run("eval", minimax_source, "--data", data, *options)

    assert calls[0][key] == expected


def test_problems_are_their_own_shots_unless_others_are_named(run, minimax_source, data, calls):
    run("eval", minimax_source, "--data", data)
    run("eval", minimax_source, "--data", data, "--shots", data)
    run("eval", minimax_source, "--data", data, "--shots", TEST_DATA)

    own, same, other = (call["questions"] for call in calls)
    assert own.shots_name is same.shots_name is None
    assert own.shots == own.problems
    assert (other.shots_name, len(other.shots)) == (str(TEST_DATA), 500)


def test_gsm8k_comes_from_the_hub(run, minimax_source, calls, monkeypatch):
    asked = []

    def rows(source):
        asked.append((source.dataset, source.config, source.split))
        return [{"question": f"{source.split}?", "answer": "#### 1"}]

    monkeypatch.setattr("fp8kv.calibrate.data.hub.load_hub_rows", rows)
    run("eval", minimax_source, "--gsm8k")

    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    questions = calls[0]["questions"]
    assert [problem.question for problem in questions.problems] == ["test?"]
    assert [problem.question for problem in questions.shots] == ["train?"]


def test_interrupted_it_promises_only_what_samples_keep(run, minimax_source, data, calls):
    without = run("eval", minimax_source, "--data", data)
    kept = run("eval", minimax_source, "--data", data, "--samples", "answers.jsonl")

    assert without.exit_code == kept.exit_code == 130
    assert without.stderr == "interrupted\n"
    assert kept.stderr.startswith("interrupted; the same command goes on")


def test_samples_hold_the_answers_and_spare_the_second_run(run, minimax_out, data, monkeypatch):
    options = ["--data", data, "--limit", "1", *FAST, "--samples", "answers.jsonl", "--json"]
    first = json.loads(run("eval", minimax_out, *options).stdout)
    monkeypatch.setattr("fp8kv.runtime.evaluation.generate_greedy", None)

    second = json.loads(run("eval", minimax_out, *options).stdout)

    assert second["protocol_digest"] == first["protocol_digest"]
    for name, arm in first["arms"].items():
        assert second["arms"][name]["agreement"] == arm["agreement"]


def test_a_prompt_that_does_not_fit_is_one_sentence(run, minimax_out, data):
    result = run(
        "eval", minimax_out, "--data", data, "--max-new-tokens", "4096", "--num-fewshot", "1"
    )

    assert result.exit_code == 3
    assert "exceed the model's" in result.stderr
    assert "--num-fewshot" in result.stderr
