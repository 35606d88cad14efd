"""``fp8kv calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fp8kv.options import (
    link_option,
    on_interrupt,
    output_options,
    scale_options,
    scale_overrides,
    target_option,
)
from fp8kv.output import Output
from fp8kv.recipes import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8kv.calibrate.formats.targets import TargetEffect
    from fp8kv.calibrate.pipeline import CalibrationResult
    from fp8kv.recipes import Recipe


@click.command("calibrate", short_help="Measure, choose scales, write a checkpoint.")
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to make.")
@click.option("--revision", help="Revision of a hub id.")
@click.option(
    "--recipe", "recipe_name", help="Built-in recipe or YAML file.  [default: one that fits MODEL]"
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    help="NAME_OR_PATH[,config=C][,split=S][,column=C][,weight=W]; hub name, jsonl, json, parquet, csv or "
    "txt; several are mixed.",
)
@click.option("--num-samples", type=click.IntRange(min=1), help="Samples over all datasets.")
@click.option("--seq-len", type=click.IntRange(min=2), help="Longest sample in tokens.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples per forward pass.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the choice and order of samples.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(get_args(schema.Dtype)), help="Of the forward passes.")
@scale_options
@target_option
@link_option
@click.option("--stats-only", is_flag=True, help="Write kv-stats.safetensors, no checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Let the checkpoint run Python code of its own."
)
@output_options
def calibrate_command(
    model: str,
    out: Path | None,
    revision: str | None,
    recipe_name: str | None,
    device: str,
    link: str,
    stats_only: bool,
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Measure MODEL's KV cache on data, choose scales, and write a checkpoint that has them.

    MODEL is a directory or a Hugging Face id. Its weights are linked, never rewritten. Options win over the
    recipe, the recipe over the defaults. Interrupted, the same command goes on from its last snapshot.
    """
    if out is None and not dry_run:
        raise click.UsageError("--out DIR is needed: where shall the result go?")
    output = Output(as_json=as_json, quiet=quiet)
    recipe = resolve_recipe(model, revision, recipe_name, values, output)
    if dry_run or out is None:
        _show_plan(model, out, recipe, revision, device, output)
        return
    from fp8kv.calibrate.pipeline import calibrate
    from fp8kv.demo import BUILTIN_DATASETS

    on_interrupt(
        f"{out} was not made; the same command goes on from its last snapshot, one every 30 s"
    )
    with output.progress() as bars:
        result = calibrate(
            model,
            out,
            recipe=recipe,
            revision=revision,
            device=device,
            stats_only=stats_only,
            link=link,  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code,
            builtin_datasets=BUILTIN_DATASETS,
            listener=bars,
        )
    show_result(result, recipe, output)


def resolve_recipe(
    model: str,
    revision: str | None,
    recipe_name: str | None,
    values: dict[str, Any],
    output: Output,
) -> Recipe:
    """Return the recipe with the command line laid over it."""
    from fp8kv.calibrate.formats.checkpoint import open_checkpoint
    from fp8kv.recipes import default_recipe, find_recipe_for, load_recipe, override

    # a hub id is downloaded here, while the hub client has the terminal to itself
    checkpoint = open_checkpoint(model, revision)
    if recipe_name is None:
        recipe_name = find_recipe_for(checkpoint.config, source=model)
        if recipe_name is not None:
            output.say(f"recipe {recipe_name} fits this model; --recipe names another")
    recipe = default_recipe() if recipe_name is None else load_recipe(recipe_name)
    overrides = scale_overrides(values)
    for name in ("num_samples", "seq_len", "seed"):
        overrides[f"data.{name}"] = values.get(name)
    for name in ("batch_size", "dtype"):
        overrides[f"calibration.{name}"] = values.get(name)
    overrides["data.sources"] = _sources(values.get("datasets") or ())
    return override(recipe, overrides)


def show_result(
    result: CalibrationResult, recipe: Recipe, output: Output, *, print_path: bool = True
) -> None:
    """Show what a calibration found, and say where it lies and how to serve it."""
    from dataclasses import asdict

    from fp8kv.calibrate.pipeline import result_json
    from fp8kv.tables import (
        VERDICT_COLUMNS,
        VERDICT_LEGEND,
        convergence_sentence,
        verdict_rows,
        verdict_sentence,
        verdict_title,
    )

    output.table(
        verdict_title("KV cache", result.verdicts),
        VERDICT_COLUMNS,
        verdict_rows(result.verdicts),
        VERDICT_LEGEND,
    )
    for note in dict.fromkeys(verdict.note for verdict in result.verdicts if verdict.note):
        output.say(f"note: {note}")
    output.say(verdict_sentence(result.verdicts))
    output.say(convergence_sentence(result.curve))
    output.say(
        f"calibrated on {result.samples.num_tokens:,} tokens of {len(result.samples.samples):,} samples "
        f"in {result.seconds:.1f} s"
    )
    show_effects(result.effects, result.out, recipe, output)
    if print_path:
        output.data(str(result.out))
    output.json(
        {
            "out": str(result.out),
            "tokens": result.samples.num_tokens,
            "samples": len(result.samples.samples),
            "seconds": round(result.seconds, 3),
            "targets": [asdict(effect) for effect in result.effects],
            **result_json(result.scales, result.verdicts, result.curve),
        }
    )


def show_effects(
    effects: Sequence[TargetEffect], out: Path, recipe: Recipe, output: Output
) -> None:
    """Show what each engine does with the checkpoint in ``out``, and the commands that serve it."""
    if not effects:
        return
    from fp8kv.tables import EFFECT_COLUMNS, effect_rows, serve_commands

    output.table("engines", EFFECT_COLUMNS, effect_rows(effects))
    output.say("serve it with one of")
    for command in serve_commands(effects, out, recipe):
        output.say(f"  {command}")


def _sources(datasets: tuple[str, ...]) -> list[dict[str, Any]] | None:
    from dataclasses import asdict

    from fp8kv.calibrate.data.sources import parse_source

    return [asdict(parse_source(text)) for text in datasets] or None


def _show_plan(
    model: str,
    out: Path | None,
    recipe: Recipe,
    revision: str | None,
    device: str,
    output: Output,
) -> None:
    from fp8kv.calibrate.overlay.writer import check_output
    from fp8kv.calibrate.plan import estimate_seconds, plan_calibration
    from fp8kv.tables import EFFECT_COLUMNS, effect_rows, plan_rows

    plan = plan_calibration(model, recipe, revision=revision, device=device)
    if out is not None:
        check_output(plan.checkpoint.path, out)
    facts = plan.to_json(round(estimate_seconds(plan), 1))
    output.table("plan", ("what", "value"), plan_rows(facts, recipe))
    output.table("engines", EFFECT_COLUMNS, effect_rows(plan.effects))
    output.json(facts)
