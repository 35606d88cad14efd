"""GSM8K under the arms: answers, samples, and lm-evaluation-harness' own answers."""

import dataclasses
import json

import pytest

from fp8kv.demo import TEST_DATA, TRAIN_DATA
from fp8kv.recipes.errors import DataError, EvaluationError
from fp8kv.runtime.evaluation.arms import EngineOptions, arm_opener
from fp8kv.runtime.evaluation.gsm8k import STOPS, load_problems
from fp8kv.runtime.evaluation.gsm8k_eval import (
    Gsm8kMeasurement,
    Gsm8kSettings,
    Questions,
    stop_strings,
)
from fp8kv.runtime.llm import LoadedModel
from fp8kv.runtime.requests import Choice, Completion

# of tiny-minimax-m2 in float32 on three problems of one shot, by lm_eval 0.4.13's own `hf` model
HARNESS_ANSWERS = (
    " Evelyn has 6*5 = <<6*5=30>>30 apples.\nSavannah has 9*3 = <<9*3=27>>27 apples.\n"
    "Evelyn has 30-27 = <<30-27=3>>3 more apples.\n#### 3\n\n",
    " One bouquet has 8+5 = <<8+5=13>>13 flowers.\nJohn needs 13*12 = <<13*12=156>>156 flowers.\n"
    "The flowers cost 156*2 = $<<156*2=312>>312.\n#### 312\n\n",
    " The cupcakes cost 6*2 = $<<6*2=12>>12.\nShe has 50-12 = $<<50-12=38>>38 left.\n"
    "Ava earns 2*9 = $<<2*9=18>>18.\nThen she has 38+18 = $<<38+18=56>>56.\n#### 56\n\n",
)


@pytest.fixture(scope="module")
def questions():
    return Questions("test", load_problems(TEST_DATA), "train", load_problems(TRAIN_DATA))


@pytest.fixture(scope="module")
def loaded(minimax):
    return LoadedModel(minimax.model, minimax.tokenizer, None, minimax.checkpoint)


def make(questions, loaded, *, run=(), progress=lambda *_: None, **settings):
    settings = {"limit": 3, "num_fewshot": 1} | settings
    return Gsm8kMeasurement(Gsm8kSettings(questions, **settings), loaded, run, progress)


class Answers:
    """An engine that answers the prompts in another order, each with a text of its own."""

    def __init__(self, texts):
        self.texts = texts
        self.asked = []

    def generate_iter(self, prompts, parameters):
        self.parameters = parameters
        self.asked += prompts
        for number in reversed(range(len(prompts))):
            choice = Choice(self.texts[tuple(prompts[number])], (), (), "stop")
            yield number, Completion(tuple(prompts[number]), (choice,))


@pytest.fixture
def answers(questions, loaded):
    """An engine that gives the reference answers of the first problems, and goes on."""
    measurement = make(questions, loaded)
    references = [problem.answer for problem in questions.problems[:3]]
    return Answers(
        {
            tuple(ids): f" {answer}\n\nQuestion: more #### 0"
            for ids, answer in zip(measurement._encoded, references, strict=True)
        }
    )


def test_answers_belong_to_their_problems_whatever_order_they_come_in(
    questions, loaded, answers, tmp_path
):
    told = []
    path = tmp_path / "answers.jsonl"
    measurement = make(
        questions, loaded, samples=path, progress=lambda *progress: told.append(progress)
    )

    measurement.run("fp8", answers)

    section = measurement.result()
    assert section.arms["fp8"].strict.value == 1.0
    assert section.arms["fp8"].agreement is None
    assert section.comparisons == {}
    assert told == [("answers with fp8", 0, 3)] + [("answers with fp8", 1, 3)] * 3
    entries = {entry["index"]: entry["text"] for entry in map(json.loads, path.open())}
    assert entries == {
        row: f" {problem.answer}\n\n" for row, problem in enumerate(questions.problems[:3])
    }, "cut at the stop string"
    assert answers.parameters.stop == stop_strings(loaded.tokenizer)
    assert (answers.parameters.max_tokens, answers.parameters.temperature) == (256, 0.0)


def test_what_the_samples_file_knows_is_not_asked_again(questions, loaded, answers, tmp_path):
    path = tmp_path / "answers.jsonl"
    first = make(questions, loaded, samples=path)
    first.run("bf16", answers)
    lines = path.read_bytes().splitlines(keepends=True)
    # the first problem's answer came last; a kill in the middle of the next one
    assert json.loads(lines[2])["index"] == 0
    path.write_bytes(lines[2] + lines[1][:20])
    answers.asked.clear()
    told = []

    again = make(questions, loaded, samples=path, progress=lambda *one: told.append(one[1]))
    again.run("bf16", answers)

    assert len(answers.asked) == 2
    assert told == [1, 1, 1], "the answer that was there, then the others"
    assert again.result().arms["bf16"].strict == first.result().arms["bf16"].strict
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    answers.asked.clear()
    again.run("fp8", answers)
    assert len(answers.asked) == 3, "another arm has its own answers"


@pytest.mark.parametrize(
    "other", [{"run": ("float16",)}, {"max_new_tokens": 3}, {"num_fewshot": 0}, {"limit": 2}]
)
def test_samples_of_another_run_are_refused(questions, loaded, answers, tmp_path, other):
    path = tmp_path / "answers.jsonl"
    make(questions, loaded, samples=path).run("bf16", answers)
    with pytest.raises(EvaluationError, match="answers of another run"):
        make(questions, loaded, samples=path, **other)


def test_the_section_says_what_was_asked(questions, loaded, answers):
    measurement = make(questions, loaded)
    measurement.run("bf16", answers)
    measurement.run("fp8", answers)
    section = measurement.result()
    assert (section.data, section.shots) == ("test", "train")
    assert (section.n, section.num_fewshot, section.max_new_tokens) == (3, 1, 256)
    assert list(section.comparisons) == ["fp8"]
    assert section.comparisons["fp8"].flexible.both_right == 3


def test_the_protocol_digest_is_stable(questions, loaded, answers):
    # of four problems, two shots each, and the stop strings with the tokenizer's own
    measurement = make(questions, loaded, limit=4, num_fewshot=2)
    assert measurement._digest == (
        "a660ffb05e183bd95f734be68db3dcb3149334571b25e31920d4cd2ee70e78f5"
    )


def test_problems_that_are_their_own_shots_are_never_shown_solved(questions, loaded):
    problems = questions.problems[:3]
    digests = {
        make(Questions("test", problems, name, problems), loaded, num_fewshot=2)._digest
        for name in (None, "a copy")
    }
    assert len(digests) == 2


def test_without_the_baseline_nothing_is_compared(questions, loaded):
    measurement = make(questions, loaded)
    measurement.compare(None, ("fp8-unit", "fp8"))
    assert measurement._agreements == {}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"problems": []}, EvaluationError, "there are no problems to evaluate"),
        ({"shots": []}, DataError, "needs 1 different problems to draw its shots from"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(questions, loaded, changes, kind, message):
    with pytest.raises(kind, match=message):
        make(dataclasses.replace(questions, **changes), loaded)


def test_a_prompt_that_does_not_fit_is_refused(questions, loaded):
    message = "and 4000 new ones exceed the model's 4096 positions: use fewer shots"
    with pytest.raises(EvaluationError, match=message):
        make(questions, loaded, max_new_tokens=4000)


def test_stops_are_the_harness_and_the_tokenizers_end(loaded):
    assert stop_strings(loaded.tokenizer) == (*STOPS, "<|eos|>")

    class NoEnd:
        eos_token = None

    assert stop_strings(NoEnd()) == STOPS


@pytest.fixture(scope="module")
def answered(questions, loaded, tmp_path_factory):
    """The unquantised arm's own answers to three problems."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    measurement = make(questions, loaded, samples=path)
    with arm_opener(loaded, EngineOptions())("bf16") as llm:
        measurement.run("bf16", llm)
    measurement.compare(arm_opener(loaded, EngineOptions()), ("bf16", "fp8-unit"))
    texts = {entry["index"]: entry["text"] for entry in map(json.loads, path.open())}
    return measurement, [texts[row] for row in range(3)]


def test_the_trained_model_answers_rightly(answered):
    measurement, _ = answered
    bf16 = measurement.result().arms["bf16"]
    assert bf16.strict.value == bf16.flexible.value == 1.0
    assert bf16.agreement.kl == 0
    assert bf16.agreement.nll < 0.1


def test_answers_are_those_of_the_harness(answered):
    assert tuple(answered[1]) == HARNESS_ANSWERS


def test_answers_are_those_of_the_harness_live(answered, loaded, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    measurement, texts = answered
    model = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    settings = {"until": list(STOPS), "do_sample": False, "temperature": 0.0}
    requests = [
        Instance("generate_until", {}, (prompt, settings), 0) for prompt in measurement._prompts
    ]
    assert model.generate_until(requests, disable_tqdm=True) == texts
