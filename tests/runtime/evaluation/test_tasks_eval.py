"""lm-evaluation-harness' tasks under the arms: what is asked for, and what drops."""

import pytest

from fp8kv.runtime.evaluation import tasks_eval
from fp8kv.runtime.evaluation.lm_eval_adapter import TaskResults
from fp8kv.runtime.evaluation.tasks_eval import TasksMeasurement, TasksSection, TasksSettings


def results(**metrics):
    return TaskResults(
        tasks={"quiz": metrics, "group": {"acc,none": 0.5}},
        num_samples={"quiz": 10},
        num_fewshot={"quiz": 0},
        higher_is_better={"quiz": {"acc": True, "perplexity": False}},
        task_versions={},
        harness="0.4.13",
    )


def test_every_arm_is_asked_the_same(monkeypatch):
    asked, told = [], []

    def run(llm, tasks, **options):
        asked.append((llm, tasks, options))
        return results()

    monkeypatch.setattr(tasks_eval, "run_tasks", run)
    settings = TasksSettings(("quiz", "a.yaml"), num_fewshot=2, limit=7, apply_chat_template=True)
    measurement = TasksMeasurement(settings, lambda *one: told.append(one))
    for arm in ("bf16", "fp8"):
        measurement.run(arm, f"model {arm}")

    options = {"num_fewshot": 2, "limit": 7, "apply_chat_template": True}
    assert asked == [(f"model {arm}", ("quiz", "a.yaml"), options) for arm in ("bf16", "fp8")]
    section = measurement.result()
    assert (section.tasks, section.limit) == (("quiz", "a.yaml"), 7)
    assert list(section.arms) == ["bf16", "fp8"]
    assert told == [(f"tasks with {arm}", n, 1) for arm in ("bf16", "fp8") for n in (0, 1)]


def test_what_drops_are_metrics_of_which_more_is_better():
    plain = {"acc,none": 0.75, "acc,strict": 0.5, "acc_stderr,none": 0.1, "perplexity,none": 3.0}
    worse = {"acc,none": 0.5, "acc,strict": 0.75, "acc_stderr,none": 0.2, "perplexity,none": 9.0}
    section = TasksSection(("quiz",), None, {"bf16": results(**plain), "fp8": results(**worse)})
    assert dict(section.drops("fp8")) == pytest.approx(
        {"quiz, acc,none": 25.0, "quiz, acc,strict": -25.0}
    )
