"""``fp8kv eval``: what is measured, output, expectations and refusals."""

import json

import pytest

from fp8kv.demo import TEST_DATA
from fp8kv.runtime.evaluation import evaluate as evaluation
from fp8kv.runtime.evaluation.eval_report import EvalReport
from fp8kv.runtime.llm import LLM

FAST = ("--num-fewshot", "1", "--max-new-tokens", "16", "--device", "cpu")
"""Too short for an answer, which is all the same to the command."""


@pytest.fixture
def data(tmp_path):
    """Three problems."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(TEST_DATA.read_text().splitlines(keepends=True)[:3]))
    return path


@pytest.fixture
def text(tmp_path):
    """A text that the embedded models know the words of."""
    path = tmp_path / "text.txt"
    path.write_text("Six apples cost 12 dollars, so one costs 2 dollars. " * 8)
    return path


@pytest.fixture
def calls(monkeypatch):
    """What the command hands to the evaluation, which is interrupted at once."""
    made = []

    def stop(model, settings, **keywords):
        made.append({"model": model, "settings": settings, **keywords})
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    return made


def test_prints_markdown_on_stdout_and_progress_on_stderr(run, minimax_out, data):
    result = run("eval", minimax_out, "--data", data, "--limit", "2", *FAST)

    assert result.exit_code == 0
    assert result.stdout.startswith(f"### Accuracy by KV cache: `{minimax_out}`")
    assert f"2 problems of `{data}`, 1-shot, greedy, at most 16 new tokens" in result.stdout
    rows = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line[:1] == "|"]
    assert rows[2:5] == ["bf16 (unquantised)", "fp8-unit (scale 1.0)", "fp8 (calibrated scales)"]
    assert result.stderr.splitlines() == [
        "loading weights",
        "answers with bf16",
        "answers with fp8-unit",
        "answers with fp8",
        "reference answers, all arms",
    ]


def test_one_run_measures_all_that_is_asked_for(run, minimax_out, data, text):
    options = ["--data", data, "--limit", "1", *FAST, "--arms", "bf16,fp8", "--quiet", "--json"]
    texts = ["--perplexity", text, "--agreement", text, "--context", "64"]
    needles = ["--needle", "--lengths", "256,300", "--depths", "0,0.5"]

    result = run("eval", minimax_out, *options, *texts, *needles)

    assert result.exit_code == 0
    assert result.stderr == ""
    report = EvalReport.from_json(json.loads(result.stdout))
    assert list(report.arms) == ["bf16", "fp8"]
    assert list(report.sections.present()) == ["gsm8k", "perplexity", "agreement", "needle"]
    assert (report.sections.gsm8k.n, report.sections.gsm8k.num_fewshot) == (1, 1)
    assert report.sections.perplexity.context == report.sections.agreement.context == 64
    assert report.sections.needle.lengths == (256, 300)
    assert report.sections.needle.depths == (0.0, 0.5)


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
        "or leave out 'fp8'\n"
    )


class TestExpectations:
    """A threshold that is not met gives an exit status of its own."""

    def test_what_is_met_changes_nothing(self, run, minimax_out, text):
        options = ["--agreement", text, "--context", "64", "--arms", "bf16,fp8", "--device", "cpu"]
        result = run("eval", minimax_out, *options, "--expect", "max_kl=1000")
        assert result.exit_code == 0
        assert "| max_kl | fp8 (calibrated scales) | text | met |" in result.stdout

    def test_what_is_missed_is_told_and_fails(self, run, minimax_out, text, tmp_path):
        thresholds = tmp_path / "thresholds.yaml"
        thresholds.write_text("max_kl: 1.0e-12\nmin_top1: 0.0\n")
        options = ["--agreement", text, "--context", "64", "--arms", "bf16,fp8", "--device", "cpu"]

        result = run("eval", minimax_out, *options, "--expect", thresholds, "--json")

        assert result.exit_code == 1
        outcomes = json.loads(result.stdout)["expectations"]
        assert {one["expectation"]: one["is_met"] for one in outcomes} == {
            "max_kl": False,
            "min_top1": True,
        }
        missed = [line for line in result.stderr.splitlines() if "not as expected" in line]
        assert len(missed) == 1
        assert missed[0].startswith("not as expected: max_kl of fp8 (text) is ")

    def test_the_recipe_that_the_checkpoint_was_converted_with(
        self, run, minimax_copy, data, calls
    ):
        recipe = minimax_copy / "fp8kv" / "recipe.yaml"
        content = recipe.read_text().replace("max_kl: null", "max_kl: 0.25")
        recipe.write_text(content)

        run("eval", minimax_copy, "--data", data, "--expect", "recipe", "--expect", "min_top1=0.5")

        expect = calls[0]["settings"].expect
        assert (expect.max_kl, expect.min_top1, expect.max_accuracy_drop) == (0.25, 0.5, None)

    def test_a_built_in_recipe(self, run, minimax_out, data, calls):
        run("eval", minimax_out, "--data", data, "--expect", "minimax-m2")
        assert calls[0]["settings"].expect.max_accuracy_drop == 1.0

    @pytest.mark.parametrize(
        ("expected", "message"),
        [
            ("recipe", "holds no recipe (recipe.yaml), so it was not converted by fp8kv"),
            ("max_lk=1", "unknown key expect.max_lk (did you mean max_kl?)"),
            ("min_needle_recall=1", "min_needle_recall cannot be checked without --needle"),
            ("arm=emulate", "arm=emulate expects nothing"),
        ],
    )
    def test_what_cannot_be_expected_is_one_sentence(
        self, run, minimax_source, data, expected, message
    ):
        result = run("eval", minimax_source, "--data", data, "--expect", expected)
        assert result.exit_code == 3
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()[-1:]
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--arms", "bf16,fp9"], "'--arms': 'fp9' is no arm; known: bf16, fp8-unit, fp8, emulate"),
        (["--arms", ""], "'--arms': '' is no arm"),
        (["--arms", "bf16,"], "'--arms': '' is no arm"),
        (["--arms", "fp8,fp8"], "'--arms': an arm is named twice"),
        (["--needle", "--lengths", "1k"], "'--lengths': '1k' is not whole numbers"),
        (["--needle", "--depths", "0,half"], "'--depths': '0,half' is not numbers with commas"),
        (["--shots", "x.jsonl"], None),
        (["--context", "64"], "--context goes with --perplexity or --agreement"),
        (["--lengths", "64"], "--lengths goes with --needle"),
        (["--depths", "0"], "--depths goes with --needle"),
        (["--haystack", "x"], "--haystack goes with --needle"),
        (["--apply-chat-template"], "--apply-chat-template goes with --tasks"),
        (["--gsm8k"], "--gsm8k has problems of its own: give it or --data, not both"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    run, minimax_source, data, calls, options, complaint
):
    result = run("eval", minimax_source, "--data", data, *options)

    if complaint is None:
        assert result.exit_code == 3, "the file is not there, but it was looked for"
        return
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())
    assert not calls


def test_it_must_be_said_what_to_measure(run, minimax_source):
    result = run("eval", minimax_source)

    assert result.exit_code == 2
    assert "say what to measure: --gsm8k, --data FILE" in result.stderr


@pytest.mark.parametrize(
    "options",
    [["--gsm8k", "--shots", "x.jsonl"], ["--needle", "--shots", "x.jsonl"]],
)
def test_shots_go_with_problems_of_ones_own(run, minimax_source, options):
    result = run("eval", minimax_source, *options)

    assert result.exit_code == 2
    assert "--shots goes with --data" in result.stderr


def test_samples_go_with_problems(run, minimax_source):
    result = run("eval", minimax_source, "--needle", "--samples", "x.jsonl")

    assert result.exit_code == 2
    assert "--samples goes with --gsm8k or --data" in result.stderr


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ([], "arms", ["bf16", "fp8-unit", "fp8"]),
        (["--arms", "emulate, bf16"], "arms", ["emulate", "bf16"]),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--trust-remote-code"], "trust_remote_code", True),
        ([], "options.backend", None),
        (["--backend", "triton"], "options.backend", "triton"),
        (["--max-sequences", "3"], "options.max_sequences", 3),
        (["--max-batch-tokens", "64"], "options.max_batch_tokens", 64),
        (["--memory-fraction", "0.5"], "options.memory_fraction", 0.5),
        ([], "settings.gsm8k.limit", None),
        (["--limit", "2"], "settings.gsm8k.limit", 2),
        ([], "settings.gsm8k.num_fewshot", 5),
        (["--num-fewshot", "0"], "settings.gsm8k.num_fewshot", 0),
        ([], "settings.gsm8k.max_new_tokens", 256),
        (["--max-new-tokens", "9"], "settings.gsm8k.max_new_tokens", 9),
        ([], "settings.perplexity", None),
        ([], "settings.agreement", None),
        ([], "settings.needle", None),
        ([], "settings.tasks", None),
        ([], "settings.expect", None),
        (["--needle"], "settings.needle.lengths", None),
        (["--needle", "--depths", "0.25"], "settings.needle.depths", (0.25,)),
        (["--tasks", "arc_easy, a.yaml"], "settings.tasks.tasks", ("arc_easy", "a.yaml")),
        (["--tasks", "arc_easy"], "settings.tasks.num_fewshot", None),
        (["--tasks", "x", "--num-fewshot", "2"], "settings.tasks.num_fewshot", 2),
        (["--tasks", "x", "--limit", "2"], "settings.tasks.limit", 2),
        (["--tasks", "x", "--apply-chat-template"], "settings.tasks.apply_chat_template", True),
    ],
)
def test_every_option_reaches_the_evaluation(
    run, minimax_source, data, calls, options, key, expected
):
    run("eval", minimax_source, "--data", data, *options)

    found = calls[0]
    for number, name in enumerate(key.split(".")):
        found = found[name] if number == 0 else getattr(found, name)
    assert found == expected


def test_texts_are_read_from_their_files(run, minimax_source, text, calls):
    run("eval", minimax_source, "--perplexity", text, "--agreement", text, "--context", "99")
    run("eval", minimax_source, "--needle", "--haystack", text)

    first, second = (call["settings"] for call in calls)
    assert (first.perplexity.name, first.perplexity.text) == (str(text), text.read_text())
    assert (first.agreement.name, first.agreement.text) == (str(text), text.read_text())
    assert (first.perplexity.context, first.agreement.context) == (99, 99)
    assert first.gsm8k is None
    assert second.needle.haystack == text.read_text()


@pytest.mark.parametrize("option", ["--data", "--perplexity", "--agreement"])
def test_a_file_that_is_not_there_is_one_sentence(run, minimax_source, option):
    result = run("eval", minimax_source, option, "nowhere.txt")

    assert result.exit_code == 3
    assert result.stderr.startswith("error: cannot read ")
    assert "nowhere.txt" in result.stderr


def test_problems_are_their_own_shots_unless_others_are_named(run, minimax_source, data, calls):
    run("eval", minimax_source, "--data", data)
    run("eval", minimax_source, "--data", data, "--shots", data)
    run("eval", minimax_source, "--data", data, "--shots", TEST_DATA)

    own, same, other = (call["settings"].gsm8k.questions for call in calls)
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
    questions = calls[0]["settings"].gsm8k.questions
    assert [problem.question for problem in questions.problems] == ["test?"]
    assert [problem.question for problem in questions.shots] == ["train?"]


def test_interrupted_it_promises_only_what_samples_keep(run, minimax_source, data, calls):
    without = run("eval", minimax_source, "--data", data)
    kept = run("eval", minimax_source, "--data", data, "--samples", "answers.jsonl")

    assert without.exit_code == kept.exit_code == 130
    assert without.stderr == "interrupted\n"
    assert kept.stderr.startswith("interrupted; the same command goes on")


def test_samples_hold_the_answers_and_spare_the_second_run(run, minimax_out, data, monkeypatch):
    options = ["--data", data, "--limit", "1", *FAST, "--arms", "bf16", "--json"]
    first = json.loads(run("eval", minimax_out, *options, "--samples", "answers.jsonl").stdout)
    asked = []
    monkeypatch.setattr(
        LLM, "generate_iter", lambda _llm, prompts, _how: iter(asked.extend(prompts) or ())
    )

    second = json.loads(run("eval", minimax_out, *options, "--samples", "answers.jsonl").stdout)

    assert not asked
    before, after = first["sections"]["gsm8k"], second["sections"]["gsm8k"]
    assert after["protocol_digest"] == before["protocol_digest"]
    assert after["arms"]["bf16"]["strict"] == before["arms"]["bf16"]["strict"]


def test_a_prompt_that_does_not_fit_is_one_sentence(run, minimax_out, data):
    result = run(
        "eval", minimax_out, "--data", data, "--max-new-tokens", "4096", "--num-fewshot", "1"
    )

    assert result.exit_code == 3
    assert "exceed the model's" in result.stderr
    assert "--num-fewshot" in result.stderr


def test_the_help_groups_the_options(run):
    result = run("eval", "--help")

    titles = [line for line in result.stdout.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [
        "What to measure:",
        "Word problems:",
        "Texts, needles and tasks:",
        "How to run:",
        "Options:",
    ]
    shown = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  --")}
    from fp8kv.commands.eval import eval_command

    named = {parameter.opts[0] for parameter in eval_command.params if parameter.opts[0][0] == "-"}
    assert named - {"-q", "--quiet"} <= shown
