"""Run tasks of lm-evaluation-harness on the engine.

The harness (0.4.13) builds the prompts, extracts the answers and computes the metrics; the engine answers as
:mod:`fp8kv.runtime.evaluation.harness_model` says.

The harness is an extra (``pip install "fp8kv[eval]"``) and is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from yaml import YAMLError

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.answer_scores import MeasuredModel
from fp8kv.runtime.evaluation.harness_model import harness_model, import_harness
from fp8kv.runtime.evaluation.harness_quiet import quiet_harness


@dataclass(frozen=True)
class TaskResults:
    """What the harness reports.

    Attributes:
        tasks: of each task and group of tasks the metrics, under the harness' names (``exact_match,strict-match``,
            ``acc_stderr,none``); a standard error that the harness does not give is left out.
        num_samples: questions of each task that were asked.
        num_fewshot: examples in each prompt, by task.
        higher_is_better: of each task and metric (without the filter's name) whether more of it is better, where the
            task says so.
        task_versions: of each task, where it names one.
        harness: version of lm-evaluation-harness.
    """

    tasks: Mapping[str, Mapping[str, float]]
    num_samples: Mapping[str, int]
    num_fewshot: Mapping[str, int]
    higher_is_better: Mapping[str, Mapping[str, bool]]
    task_versions: Mapping[str, str]
    harness: str


def run_tasks(
    llm: MeasuredModel,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> TaskResults:
    """Run tasks and return their metrics.

    Args:
        llm: a model with its cache.
        tasks: names of tasks, groups or tags that the harness knows, or paths of a task's YAML.
        num_fewshot: examples in each prompt; None takes each task's own number.
        limit: questions of each task; None for all.
        apply_chat_template: whether prompts go through the tokenizer's chat template.

    Raises:
        EvaluationError: the harness is not installed, a task is unknown, its data cannot be had, it cannot be run as
            it is written or asked for, or it asks for something that the engine does not do.
        RequestError: a prompt does not fit the model or its cache.
    """
    harness = import_harness()
    manager = _find(harness, tasks)
    if apply_chat_template and getattr(llm.tokenizer, "chat_template", None) is None:
        raise EvaluationError("the tokenizer has no chat template: run the tasks without one")
    try:
        with quiet_harness(harness):
            found = harness.evaluator.simple_evaluate(
                model=harness_model(llm),
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=apply_chat_template,
                task_manager=manager,
                log_samples=False,
            )
    except OSError as error:  # what datasets and the hub raise where data cannot be had
        raise EvaluationError(
            f"the data of {', '.join(tasks)} cannot be had: {' '.join(str(error).split())}"
        ) from error
    # what a task's file is wrong about shows anywhere in the harness
    except (ValueError, TypeError, KeyError, YAMLError, TemplateError) as error:
        raise EvaluationError(
            f"lm-evaluation-harness cannot run {', '.join(tasks)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; see where with fp8kv --debug eval"
        ) from error
    return _results(found, harness.version)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what :func:`run_tasks` would refuse, as far as that can be told without a model.

    Raises:
        EvaluationError: the harness is not installed, or a task is unknown.
    """
    _find(import_harness(), tasks)


def _find(harness: Any, tasks: Sequence[str]) -> Any:
    """Return the harness' task manager, which knows all of ``tasks``."""
    paths = [task for task in tasks if Path(task).is_file()]
    # the harness' own tasks are thousands of files, which take seconds to look through
    manager = harness.tasks.TaskManager(include_defaults=len(paths) < len(tasks))
    known = {*manager.all_tasks, *paths}
    for task in tasks:
        if task not in known:
            raise EvaluationError(
                f"lm-evaluation-harness {harness.version} knows no task {task!r}: "
                "see `lm-eval ls tasks`, or give the path of a task's YAML"
            )
    return manager


def _results(found: Mapping[str, Any], version: str) -> TaskResults:
    return TaskResults(
        tasks={name: dict(_metrics(own)) for name, own in found["results"].items()},
        num_samples={name: own["effective"] for name, own in found["n-samples"].items()},
        num_fewshot=dict(found["n-shot"]),
        higher_is_better={
            name: {metric: better for metric, better in own.items() if better is not None}
            for name, own in found["higher_is_better"].items()
        },
        task_versions={
            name: str(own) for name, own in found["versions"].items() if own is not None
        },
        harness=version,
    )


def _metrics(own: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in own.items():
        # beside metrics stand the task's alias and, where there is no standard error, "N/A"
        if "," in name and not isinstance(value, str):
            yield name, float(value)
