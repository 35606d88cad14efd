"""``fp8kv eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fp8kv.options import on_interrupt, output_options
from fp8kv.output import Output
from fp8kv.recipes import schema

if TYPE_CHECKING:
    from fp8kv.runtime.eval_report import EvalReport
    from fp8kv.runtime.gsm8k_eval import Questions


def _parse_arms(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    from fp8kv.runtime.eval_report import ARMS

    arms = [arm.strip() for arm in value.split(",")]
    for arm in arms:
        if arm not in ARMS:
            raise click.BadParameter(f"{arm!r} is no arm; known: {', '.join(ARMS)}")
    if len(set(arms)) != len(arms):
        raise click.BadParameter("an arm is named twice")
    return arms


@click.command("eval", short_help="Compare FP8 caches with the unquantised one.")
@click.argument("model")
@click.option("--revision", help="Revision of a hub id.")
@click.option("--gsm8k", is_flag=True, help="GSM8K's test split, shots from its train split.")
@click.option("--data", "data_path", help="Problems: jsonl or json with question and answer.")
@click.option("--shots", "shots_path", help="Pool of shots.  [default: the problems themselves]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many problems.")
@click.option("--num-fewshot", type=click.IntRange(min=0), default=5, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--arms",
    default="bf16,fp8-unit,fp8",
    show_default=True,
    callback=_parse_arms,
    help="Ways to hold the cache: unquantised, FP8 at scale 1.0, FP8 at the checkpoint's scales.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(get_args(schema.Dtype)), default="auto")
@click.option(
    "--fp8-format",
    type=click.Choice(get_args(schema.Fp8Format)),
    default="e4m3fn",
    show_default=True,
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="Keep every answer in this jsonl file; an interrupted run goes on from it.",
)
@click.option(
    "--trust-remote-code", is_flag=True, help="Let the checkpoint run Python code of its own."
)
@output_options
def eval_command(
    model: str,
    gsm8k: bool,
    data_path: str | None,
    shots_path: str | None,
    arms: list[str],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare FP8 caches with the unquantised cache on the same questions.

    The protocol is lm-evaluation-harness' GSM8K: same prompts, greedy, same stops and filters. Beside exact match
    it reports, on the reference answers, likelihood, agreement and divergence, which see far smaller differences.
    """
    if gsm8k == (data_path is not None):
        raise click.UsageError("say what to evaluate on: either --gsm8k or --data FILE")
    if gsm8k and shots_path is not None:
        raise click.UsageError("--shots goes with --data; --gsm8k takes them from its train split")
    from fp8kv.calibrate.formats.checkpoint import open_checkpoint
    from fp8kv.runtime.eval_markdown import to_markdown
    from fp8kv.runtime.gsm8k_eval import evaluate_gsm8k

    output = Output(as_json=as_json, quiet=quiet)
    # a hub id is downloaded here, while the hub client has the terminal to itself
    open_checkpoint(model, options["revision"])
    questions = _gsm8k() if data_path is None else read_questions(data_path, shots_path)
    total = min(options["limit"] or len(questions.problems), len(questions.problems))
    if options["samples"] is not None:
        on_interrupt("the same command goes on with the answers that are missing in --samples")
    with output.progress() as bars:
        report: EvalReport = evaluate_gsm8k(
            model,
            questions,
            arms=arms,
            progress=lambda task, count: bars.add(task_label(task), count, total),
            **options,
        )
    output.data(to_markdown(report))
    output.json(report.to_json())


def task_label(task: str) -> str:
    """Return what a progress bar calls a task of an evaluation."""
    return "reference answers, all arms" if task == "agreement" else f"answers with {task}"


def read_questions(data_path: str, shots_path: str | None) -> Questions:
    """Read problems and shots from files, or from a built-in name."""
    from fp8kv.demo import BUILTIN_DATASETS
    from fp8kv.runtime.gsm8k import load_problems
    from fp8kv.runtime.gsm8k_eval import Questions

    problems = load_problems(BUILTIN_DATASETS.get(data_path, Path(data_path)))
    same = shots_path is None or Path(shots_path).resolve() == Path(data_path).resolve()
    if same or shots_path is None:
        return Questions(data_path, problems, None, problems)
    pool = load_problems(BUILTIN_DATASETS.get(shots_path, Path(shots_path)))
    return Questions(data_path, problems, shots_path, pool)


def _gsm8k() -> Questions:
    from fp8kv.calibrate.data.hub import load_hub_rows
    from fp8kv.calibrate.data.sources import Source
    from fp8kv.runtime.gsm8k import Problem
    from fp8kv.runtime.gsm8k_eval import Questions

    test, train = (
        [
            Problem(question=row["question"], answer=row["answer"])
            for row in load_hub_rows(Source("openai/gsm8k", config="main", split=split))
        ]
        for split in ("test", "train")
    )
    return Questions("openai/gsm8k, test", test, "openai/gsm8k, train", train)
