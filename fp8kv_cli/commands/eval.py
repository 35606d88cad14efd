"""``fp8kv eval``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from fp8kv.options import on_interrupt, output_options
from fp8kv.output import Output
from fp8kv.recipes import schema

EXIT_NOT_AS_EXPECTED = 1

_GROUPS = {
    "What to measure": ("gsm8k", "data_path", "perplexity", "agreement", "needle", "tasks"),
    "Word problems": ("shots_path", "num_fewshot", "max_new_tokens", "limit", "samples"),
    "Texts, needles and tasks": ("context", "lengths", "depths", "haystack", "apply_chat_template"),
    "How to run": (
        "arms",
        "device",
        "dtype",
        "backend",
        "max_sequences",
        "max_batch_tokens",
        "memory_fraction",
        "revision",
        "trust_remote_code",
    ),
}
"""The sections of the help; an option that stands in none goes under "Options"."""


class _GroupedCommand(click.Command):
    """A command whose help lists its options by what they are for."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = {
            one.name: one for one in self.get_params(ctx) if isinstance(one, click.Option)
        }
        grouped = {name for names in _GROUPS.values() for name in names}
        rest = tuple(name for name in parameters if name is not None and name not in grouped)
        for title, names in {**_GROUPS, "Options": rest}.items():
            records = [parameters[name].get_help_record(ctx) for name in names]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])


def _parse_numbers(
    kind: type[int] | type[float],
) -> Callable[[click.Context, click.Parameter, str | None], tuple[float, ...] | None]:
    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            return tuple(kind(part) for part in value.split(","))
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise click.BadParameter(f"{value!r} is not {what} with commas between them") from None

    return parse


def _parse_arms(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    from fp8kv.runtime.evaluation.arms import ARMS

    arms = [arm.strip() for arm in value.split(",")]
    for arm in arms:
        if arm not in ARMS:
            raise click.BadParameter(f"{arm!r} is no arm; known: {', '.join(ARMS)}")
    if len(set(arms)) != len(arms):
        raise click.BadParameter("an arm is named twice")
    return arms


@click.command(
    "eval", cls=_GroupedCommand, short_help="Compare FP8 caches with the unquantised one."
)
@click.argument("model")
@click.option("--gsm8k", is_flag=True, help="GSM8K's test split, shots from its train split.")
@click.option(
    "--data",
    "data_path",
    metavar="FILE",
    help="Problems of your own, or builtin:gsm-synth: jsonl, with `question` and `answer`.",
)
@click.option("--perplexity", metavar="FILE", help="Perplexity of a text in UTF-8.")
@click.option("--agreement", metavar="FILE", help="KL and top-1 agreement on a text, by position.")
@click.option(
    "--needle", is_flag=True, help="Pass keys hidden in contexts up to the model's length."
)
@click.option("--tasks", metavar="NAME,...", help="lm-evaluation-harness' tasks (extra `eval`).")
@click.option(
    "--shots",
    "shots_path",
    metavar="FILE",
    help="Pool of shots for --data.  [default: the problems themselves]",
)
@click.option(
    "--num-fewshot",
    type=click.IntRange(min=0),
    help="Shots in each prompt.  [default: 5; a task's own]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Of an answer, at most.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Only the first so many problems (of each task)."
)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep every answer in this jsonl file; an interrupted run goes on from it.",
)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Tokens of a text that are read at a time.  [default: 2048]",
)
@click.option(
    "--lengths",
    metavar="N,N,...",
    callback=_parse_numbers(int),
    help="Tokens of a needle's context.  [default: 512, 1024, ... the model's]",
)
@click.option(
    "--depths",
    metavar="N,N,...",
    callback=_parse_numbers(float),
    help="Of a needle, 0 to 1.  [default: 0,0.1,...,1]",
)
@click.option("--haystack", metavar="FILE", help="A text to hide the needles in.")
@click.option(
    "--apply-chat-template", is_flag=True, help="Put tasks through the tokenizer's chat template."
)
@click.option(
    "--arms",
    metavar="NAME,...",
    default="bf16,fp8-unit,fp8",
    show_default=True,
    callback=_parse_arms,
    help="Ways to hold the cache: unquantised, FP8 at scale 1.0, FP8 at the checkpoint's scales; emulate is the "
    "last with unquantised attention, and tells a kernel's error from the quantisation's.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype",
    type=click.Choice(get_args(schema.Dtype)),
    default="auto",
    show_default=True,
    help="Of weights and arithmetic; auto: the checkpoint's on a GPU, float32 on a CPU.",
)
@click.option(
    "--backend",
    type=click.Choice(["reference", "triton"]),
    help="Attention kernels.  [default: triton on a GPU]",
)
@click.option(
    "--max-sequences",
    type=click.IntRange(min=1),
    help="Answers generated at a time.  [default: 256]",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    help="Tokens of a forward pass.  [default: 8192]",
)
@click.option(
    "--memory-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of a GPU's memory, for weights and cache.  [default: 0.9]",
)
@click.option("--revision", help="Revision of a hub id.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Let the checkpoint run Python code of its own."
)
@click.option(
    "--expect",
    "expectations",
    multiple=True,
    metavar="WHAT",
    help="Fail unless it holds: KEY=VALUE (max_accuracy_drop=1), a recipe or YAML file with an expect section, or "
    "`recipe` for the one that MODEL was converted with; may be given several times.",
)
@output_options
def eval_command(
    model: str,
    arms: list[str],
    expectations: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare FP8 caches with the unquantised cache on the same prompts, served by fp8kv's own kernels.

    GSM8K follows lm-evaluation-harness' protocol: same prompts, greedy, same stops and filters. Beside exact match it
    reports, on the reference answers, likelihood, agreement and divergence, which see far smaller differences.

    Exit status: 0 done, 1 an expectation is not met, 2 usage, 3 could not be done.
    """
    _check_usage(options)
    from fp8kv.calibrate.formats.checkpoint import open_checkpoint
    from fp8kv.commands.eval_settings import read_expectations, read_settings
    from fp8kv.runtime.evaluation.arms import EngineOptions
    from fp8kv.runtime.evaluation.eval_markdown import to_markdown
    from fp8kv.runtime.evaluation.evaluate import evaluate

    output = Output(as_json=as_json, quiet=quiet)
    # a hub id is downloaded here, while the hub client has the terminal to itself
    checkpoint = open_checkpoint(model, options["revision"])
    expect = read_expectations(expectations, checkpoint.path) if expectations else None
    settings = read_settings(options, expect)
    if options["samples"] is not None:
        on_interrupt("the same command goes on with the answers that are missing in --samples")
    engine = {name: options[name] for name in EngineOptions.__dataclass_fields__}
    with output.progress() as bars:
        report = evaluate(
            model,
            settings,
            revision=options["revision"],
            arms=arms,
            device=options["device"],
            dtype=options["dtype"],
            trust_remote_code=options["trust_remote_code"],
            options=EngineOptions(**engine),
            progress=bars.add,
        )
    output.data(to_markdown(report))
    output.json(report.to_json())
    for one in report.expectations:
        if one.is_met:
            continue
        output.say(
            f"not as expected: {one.expectation} of {one.arm} ({one.measured}) is {one.found:.6g}, "
            f"the threshold {one.threshold:g}"
        )
    click.get_current_context().exit(0 if report.is_as_expected else EXIT_NOT_AS_EXPECTED)


def _check_usage(options: dict[str, Any]) -> None:
    if options["gsm8k"] and options["data_path"] is not None:
        raise click.UsageError("--gsm8k has problems of its own: give it or --data, not both")
    asked = [name for name in _GROUPS["What to measure"] if options[name]]
    if not asked:
        raise click.UsageError(
            "say what to measure: --gsm8k, --data FILE, --perplexity FILE, --agreement FILE, --needle or --tasks NAMES"
        )
    if options["shots_path"] is not None and options["data_path"] is None:
        raise click.UsageError("--shots goes with --data; --gsm8k takes them from its train split")
    problems = options["gsm8k"] or options["data_path"] is not None
    for name, flag, needed, is_there in (
        ("samples", "--samples", "--gsm8k or --data", problems),
        (
            "context",
            "--context",
            "--perplexity or --agreement",
            options["perplexity"] or options["agreement"],
        ),
        ("lengths", "--lengths", "--needle", options["needle"]),
        ("depths", "--depths", "--needle", options["needle"]),
        ("haystack", "--haystack", "--needle", options["needle"]),
        ("apply_chat_template", "--apply-chat-template", "--tasks", options["tasks"]),
    ):
        if options[name] and not is_there:
            raise click.UsageError(f"{flag} goes with {needed}")
