"""What ``fp8kv eval`` measures, read from its options and the files that they name.

The imports stand inside the functions: they bring torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8kv.recipes import Expect
    from fp8kv.runtime.evaluation.evaluate import EvaluationSettings
    from fp8kv.runtime.evaluation.gsm8k_eval import Gsm8kSettings, Questions


def read_questions(data_path: str, shots_path: str | None) -> Questions:
    """Read problems and shots from files, or from a built-in name."""
    from fp8kv.demo import BUILTIN_DATASETS
    from fp8kv.runtime.evaluation.gsm8k import load_problems
    from fp8kv.runtime.evaluation.gsm8k_eval import Questions

    problems = load_problems(BUILTIN_DATASETS.get(data_path, Path(data_path)))
    same = shots_path is None or Path(shots_path).resolve() == Path(data_path).resolve()
    if same or shots_path is None:
        return Questions(data_path, problems, None, problems)
    pool = load_problems(BUILTIN_DATASETS.get(shots_path, Path(shots_path)))
    return Questions(data_path, problems, shots_path, pool)


def read_settings(options: dict[str, Any], expect: Expect | None) -> EvaluationSettings:
    """Read the files that the options of ``fp8kv eval`` name, and return what to measure.

    Raises:
        DataError: a file cannot be read.
    """
    from fp8kv.runtime.evaluation.agreement_eval import AgreementSettings
    from fp8kv.runtime.evaluation.evaluate import EvaluationSettings
    from fp8kv.runtime.evaluation.needle import DEPTHS
    from fp8kv.runtime.evaluation.needle_eval import NeedleSettings
    from fp8kv.runtime.evaluation.perplexity import read_text
    from fp8kv.runtime.evaluation.perplexity_eval import PerplexitySettings
    from fp8kv.runtime.evaluation.tasks_eval import TasksSettings

    scored, compared, tasks = (options[name] for name in ("perplexity", "agreement", "tasks"))
    context, haystack = options["context"], options["haystack"]
    names = tuple(name.strip() for name in (tasks or "").split(","))
    return EvaluationSettings(
        gsm8k=_gsm8k(options) if options["gsm8k"] or options["data_path"] is not None else None,
        perplexity=PerplexitySettings(scored, read_text(scored), context) if scored else None,
        agreement=AgreementSettings(compared, read_text(compared), context) if compared else None,
        needle=NeedleSettings(
            lengths=options["lengths"],
            depths=options["depths"] or DEPTHS,
            haystack=read_text(haystack) if haystack else None,
        )
        if options["needle"]
        else None,
        tasks=TasksSettings(
            names,
            num_fewshot=options["num_fewshot"],
            limit=options["limit"],
            apply_chat_template=options["apply_chat_template"],
        )
        if tasks
        else None,
        expect=expect,
    )


def read_expectations(settings: tuple[str, ...], directory: Path) -> Expect:
    """Read what is expected of a checkpoint.

    Args:
        settings: as :func:`fp8kv.recipes.load_expect` takes them, or ``recipe`` for the checkpoint's own.
        directory: the checkpoint.

    Raises:
        RecipeError: it was not converted with a recipe, or a setting is wrong.
    """
    from fp8kv.calibrate.pipeline import RECIPE_FILE
    from fp8kv.recipes import load_expect
    from fp8kv.recipes.errors import RecipeError

    own = directory / "fp8kv" / RECIPE_FILE
    if "recipe" in settings and not own.is_file():
        raise RecipeError(
            f"{directory} holds no recipe ({own.name}), so it was not converted by fp8kv: name a recipe or a file"
        )
    return load_expect(*(str(own) if one == "recipe" else one for one in settings))


def _gsm8k(options: dict[str, Any]) -> Gsm8kSettings:
    from fp8kv.runtime.evaluation.gsm8k import NUM_FEWSHOT
    from fp8kv.runtime.evaluation.gsm8k_eval import Gsm8kSettings

    path, num_fewshot = options["data_path"], options["num_fewshot"]
    return Gsm8kSettings(
        _hub_questions() if path is None else read_questions(path, options["shots_path"]),
        limit=options["limit"],
        num_fewshot=NUM_FEWSHOT if num_fewshot is None else num_fewshot,
        max_new_tokens=options["max_new_tokens"],
        samples=options["samples"],
    )


def _hub_questions() -> Questions:
    from fp8kv.calibrate.data.hub import load_hub_rows
    from fp8kv.calibrate.data.sources import Source
    from fp8kv.runtime.evaluation.gsm8k import Problem
    from fp8kv.runtime.evaluation.gsm8k_eval import Questions

    test, train = (
        [
            Problem(question=row["question"], answer=row["answer"])
            for row in load_hub_rows(Source("openai/gsm8k", config="main", split=split))
        ]
        for split in ("test", "train")
    )
    return Questions("openai/gsm8k, test", test, "openai/gsm8k, train", train)
