"""Tasks of lm-evaluation-harness on the engine."""

import functools
import hashlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from fp8kv.demo import MODELS, TEST_DATA, TRAIN_DATA
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.gsm8k import load_problems
from fp8kv.runtime.evaluation.gsm8k_eval import Gsm8kMeasurement, Gsm8kSettings, Questions
from fp8kv.runtime.evaluation.harness_model import harness_model
from fp8kv.runtime.evaluation.lm_eval_adapter import check_tasks, run_tasks
from fp8kv.runtime.llm import LLM, load

try:
    import lm_eval
    import lm_eval.evaluator
    import lm_eval.tasks
except ImportError:
    lm_eval = None

needs_harness = pytest.mark.skipif(lm_eval is None, reason="needs lm-evaluation-harness")

NUM_PROBLEMS = 4
NUM_FEWSHOT = 2


@pytest.fixture(scope="module")
def loaded():
    return load(MODELS["tiny-minimax-m2"], device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llm(loaded):
    with LLM(loaded, cache="float32", backend="reference", num_pages=60) as llm:
        yield llm


@pytest.fixture(autouse=True)
def quiet_and_local(monkeypatch, tmp_path):
    """Keep what the datasets library prepares in the test's own folder."""
    if lm_eval is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        # the report's list of everything that is installed takes seconds and is not read
        monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture
def choice_task(tmp_path):
    """A task of two questions, whose right answers are the likelier and the less likely one."""
    questions = [
        {"question": "Tom has 3 apples and buys 4 more. How many?", "choices": ["7", "%%"]},
        {"question": "Tom has 3 apples and buys 4 more. How many?", "choices": ["%%", "7"]},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in questions))
    path = tmp_path / "local_choice.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "task": "local_choice",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": 0,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": 2.0},
            }
        )
    )
    return path


@pytest.fixture
def gsm8k_task(tmp_path):
    """The harness' own task of this name, over local files."""
    folder = Path(lm_eval.tasks.__file__).parent / "gsm8k"

    class Loader(yaml.SafeLoader):
        """Reads what the harness' files hold beside plain YAML as text."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: node.value)
    config = yaml.load((folder / "gsm8k.yaml").read_text(), Loader)
    config |= {
        "task": "local_gsm8k",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": str(TRAIN_DATA), "test": str(TEST_DATA)}},
    }
    config.pop("tag", None)
    path = tmp_path / "local_gsm8k.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@needs_harness
def test_a_task_gives_its_metrics(llm, choice_task):
    found = run_tasks(llm, [str(choice_task)])
    assert found.tasks["local_choice"]["acc,none"] == 0.5
    assert found.tasks["local_choice"]["acc_stderr,none"] == pytest.approx(0.5)
    assert found.num_samples == {"local_choice": 2}
    assert found.num_fewshot == {"local_choice": 0}
    assert found.higher_is_better == {"local_choice": {"acc": True}}
    assert found.task_versions == {"local_choice": "2.0"}
    assert found.harness.startswith("0.")


@needs_harness
def test_a_limit_without_a_standard_error_leaves_it_out(llm, choice_task):
    found = run_tasks(llm, [str(choice_task)], limit=1)
    assert found.num_samples == {"local_choice": 1}
    assert found.tasks["local_choice"]["acc,none"] == 1
    assert all(isinstance(value, float) for value in found.tasks["local_choice"].values())


@needs_harness
def test_the_number_of_examples_is_the_one_that_is_asked_for(llm, choice_task):
    config = yaml.safe_load(choice_task.read_text()) | {"fewshot_split": "test"}
    choice_task.write_text(yaml.safe_dump(config))
    found = run_tasks(llm, [str(choice_task)], num_fewshot=1)
    assert found.num_fewshot == {"local_choice": 1}


@needs_harness
def test_prompts_go_through_the_chat_template_where_that_is_asked_for(llm, choice_task):
    seen = []

    class Watched:
        def __getattr__(self, name):
            return getattr(llm, name)

        def teacher_forced(self, sequences):
            seen.extend(llm.tokenizer.decode(prompt) for prompt, _ in sequences)
            return llm.teacher_forced(sequences)

    config = yaml.safe_load(choice_task.read_text()) | {"doc_to_text": "{{question}}"}
    choice_task.write_text(yaml.safe_dump(config))
    run_tasks(Watched(), [str(choice_task)], apply_chat_template=True)
    # what the template of this tokenizer makes of a question
    assert set(seen) == {"Question: Tom has 3 apples and buys 4 more. How many?\nAnswer:"}


@needs_harness
def test_gsm8k_is_that_of_the_harness_prompt_for_prompt_and_answer_for_answer(
    loaded, llm, gsm8k_task, tmp_path
):
    questions = Questions("test", load_problems(TEST_DATA), "train", load_problems(TRAIN_DATA))
    samples = tmp_path / "samples.jsonl"
    settings = Gsm8kSettings(questions, NUM_PROBLEMS, NUM_FEWSHOT, samples=samples)
    ours = Gsm8kMeasurement(settings, loaded, [], lambda *progress: None)
    ours.run("float32", llm)
    answers = [json.loads(line) for line in samples.read_text().splitlines()]
    answers.sort(key=lambda one: one["index"])

    found = lm_eval.evaluator.simple_evaluate(
        model=harness_model(llm),
        tasks=[str(gsm8k_task)],
        num_fewshot=NUM_FEWSHOT,
        limit=NUM_PROBLEMS,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )

    # one record for each question and filter
    records = [one for one in found["samples"]["local_gsm8k"] if one["filter"] == "strict-match"]
    records.sort(key=lambda one: one["doc_id"])
    assert len(records) == len(answers) == NUM_PROBLEMS
    for record, answer in zip(records, answers, strict=True):
        prompt = record["arguments"][0][0]
        assert hashlib.sha256(prompt.encode()).hexdigest() == answer["prompt_sha256"]
        assert record["resps"][0][0] == answer["text"]
    metrics = found["results"]["local_gsm8k"]
    arm = ours.result().arms["float32"]
    assert metrics["exact_match,strict-match"] == arm.strict.value
    assert metrics["exact_match,flexible-extract"] == arm.flexible.value > 0


@pytest.fixture
def all_tasks_once(monkeypatch):
    """The harness looks through its own tasks once in a test, which takes seconds."""
    own = functools.lru_cache(lm_eval.tasks.TaskManager)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    return own


@needs_harness
def test_tasks_are_known_by_name_and_by_path_and_others_named(all_tasks_once, choice_task):
    check_tasks([str(choice_task)])
    check_tasks(["gsm8k", "mmlu", str(choice_task)])
    for function in (check_tasks, functools.partial(run_tasks, None)):
        with pytest.raises(EvaluationError, match=r"0\.\S+ knows no task 'no_such': see `lm-eval"):
            function([str(choice_task), "no_such"])
    # a path alone needs none of them
    assert all_tasks_once.cache_info().misses == 2


@needs_harness
def test_data_that_cannot_be_had_is_named(llm, choice_task):
    config = yaml.safe_load(choice_task.read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(choice_task.with_name("missing.jsonl"))
    choice_task.write_text(yaml.safe_dump(config))
    with pytest.raises(EvaluationError, match=r"^the data of .*cannot be had: .*missing\.jsonl"):
        run_tasks(llm, [str(choice_task)])


@needs_harness
@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("num_fewshot", 9, "ValueError: Sample larger than population"),
        ("no_such_key", 1, "TypeError: .* unexpected keyword argument 'no_such_key'"),
        ("doc_to_text", "{{ question", "TemplateSyntaxError: unexpected end of template"),
        ("metric_list", "[", "YAMLError|ParserError|ValueError|TypeError|KeyError"),
    ],
)
def test_a_task_that_is_written_wrong_is_one_sentence(llm, choice_task, key, value, found):
    config = yaml.safe_load(choice_task.read_text())
    choice_task.write_text(yaml.safe_dump(config | {key: value}))
    with pytest.raises(EvaluationError, match=f"^lm-eval.* cannot run {choice_task}: ({found})"):
        run_tasks(llm, [str(choice_task)])


@needs_harness
def test_nothing_of_the_harness_reaches_the_terminal(llm, choice_task, capfd, caplog, monkeypatch):
    monkeypatch.chdir(choice_task.parent)
    commit, bar = lm_eval.evaluator.get_git_commit_hash, lm_eval.api.task.tqdm
    run_tasks(llm, [str(choice_task)])
    shown = capfd.readouterr().err
    assert not [word for word in ("git", "it/s", "Tokenizing", "Generating") if word in shown]
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert lm_eval.evaluator.get_git_commit_hash is commit
    assert lm_eval.api.task.tqdm is bar


@needs_harness
def test_a_tokenizer_without_a_chat_template_is_told_of(llm, choice_task, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(EvaluationError, match="has no chat template: run the tasks without one"):
        run_tasks(llm, [str(choice_task)], apply_chat_template=True)


def test_without_the_harness_the_remedy_is_named(monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] == "lm_eval":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r'is not installed: pip install "fp8kv\[eval\]"'):
        check_tasks(["gsm8k"])
