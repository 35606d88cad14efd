"""Run lm-evaluation-harness' tasks under every arm, and the section of the report that says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fp8kv.runtime.evaluation.arms import BASELINE, Progress
from fp8kv.runtime.evaluation.lm_eval_adapter import TaskResults, run_tasks
from fp8kv.runtime.llm import LLM


@dataclass(frozen=True)
class TasksSettings:
    """What to run.

    Attributes:
        tasks: names that the harness knows, or files that define a task.
        num_fewshot: examples in each prompt; None takes each task's own number.
        limit: questions of each task; None for all.
        apply_chat_template: whether prompts go through the tokenizer's chat template.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class TasksSection:
    """Tasks of lm-evaluation-harness.

    Attributes:
        tasks: as they were asked for.
        limit: questions of each task, at most; None for all.
        arms: by arm.
    """

    tasks: tuple[str, ...]
    limit: int | None
    arms: Mapping[str, TaskResults]

    def drops(self, arm: str) -> Iterator[tuple[str, float]]:
        """Yield each metric of which more is better, and how much less of it ``arm`` has than the baseline, times 100.

        Args:
            arm: one of the arms; the baseline must be among them, too.
        """
        own, baseline = self.arms[arm], self.arms[BASELINE]
        for task, metrics in own.tasks.items():
            for metric, value in metrics.items():
                if own.higher_is_better.get(task, {}).get(metric.split(",")[0]):
                    yield f"{task}, {metric}", 100 * (baseline.tasks[task][metric] - value)


class TasksMeasurement:
    """Tasks under one arm after the other."""

    def __init__(self, settings: TasksSettings, progress: Progress) -> None:
        self._settings = settings
        self._progress = progress
        self._found: dict[str, TaskResults] = {}

    def run(self, arm: str, llm: LLM) -> None:
        """Run the tasks with ``llm``."""
        label = f"tasks with {arm}"
        self._progress(label, 0, 1)
        self._found[arm] = run_tasks(
            llm,
            self._settings.tasks,
            num_fewshot=self._settings.num_fewshot,
            limit=self._settings.limit,
            apply_chat_template=self._settings.apply_chat_template,
        )
        self._progress(label, 1, 1)

    def result(self) -> TasksSection:
        """Return the section of the report."""
        return TasksSection(self._settings.tasks, self._settings.limit, self._found)
