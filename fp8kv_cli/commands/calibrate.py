"""``fp8kv calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fp8kv.options import (
    link_option,
    output_options,
    scale_options,
    scale_overrides,
    target_option,
)
from fp8kv.output import Output
from fp8kv.recipes import schema

if TYPE_CHECKING:
    from fp8kv.calibrate.pipeline import CalibrationResult
    from fp8kv.recipes import Recipe


@click.command("calibrate")
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
@click.option("--num-samples", type=click.IntRange(min=1))
@click.option("--seq-len", type=click.IntRange(min=2), help="Longest sample in tokens.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples per forward pass.")
@click.option("--seed", type=click.IntRange(min=0))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(get_args(schema.Dtype)))
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
    recipe, the recipe over the defaults. Interrupted, the same command goes on where it was.
    """
    output = Output(as_json=as_json, quiet=quiet)
    recipe = resolve_recipe(model, revision, recipe_name, values, output)
    if dry_run:
        _show_plan(model, recipe, revision, device, output)
        return
    if out is None:
        raise click.UsageError("--out DIR is needed: where shall the result go?")
    from fp8kv.calibrate.pipeline import calibrate
    from fp8kv.demo import BUILTIN_DATASETS

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
    show_result(result, output)


def resolve_recipe(
    model: str,
    revision: str | None,
    recipe_name: str | None,
    values: dict[str, Any],
    output: Output,
) -> Recipe:
    """Return the recipe with the command line laid over it."""
    from fp8kv.recipes import default_recipe, load_recipe, override

    if recipe_name is None:
        recipe_name = _fitting_recipe(model, revision)
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


def show_result(result: CalibrationResult, output: Output, *, print_path: bool = True) -> None:
    """Show what a calibration found, and say where it lies and how to serve it."""
    from dataclasses import asdict

    from fp8kv.calibrate.pipeline import result_json
    from fp8kv.tables import (
        VERDICT_COLUMNS,
        convergence_sentence,
        effect_rows,
        verdict_rows,
        verdict_sentence,
    )

    output.table("KV cache", VERDICT_COLUMNS, verdict_rows(result.verdicts))
    for note in dict.fromkeys(verdict.note for verdict in result.verdicts if verdict.note):
        output.say(f"note: {note}")
    output.say(verdict_sentence(result.verdicts))
    output.say(convergence_sentence(result.curve))
    if result.effects:
        output.table("engines", ("engine", "scales", "why"), effect_rows(result.effects))
        for effect in result.effects:
            output.say(f"serve with {effect.serve.format(model=result.out)}")
    output.say(
        f"calibrated on {result.samples.num_tokens:,} tokens of {len(result.samples.samples):,} samples "
        f"in {result.seconds:.1f} s"
    )
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


def _fitting_recipe(model: str, revision: str | None) -> str | None:
    from fp8kv.calibrate.formats.checkpoint import open_checkpoint
    from fp8kv.recipes import find_recipe_for

    return find_recipe_for(open_checkpoint(model, revision).config, source=model)


def _sources(datasets: tuple[str, ...]) -> list[dict[str, Any]] | None:
    from dataclasses import asdict

    from fp8kv.calibrate.data.sources import parse_source

    return [asdict(parse_source(text)) for text in datasets] or None


def _show_plan(
    model: str, recipe: Recipe, revision: str | None, device: str, output: Output
) -> None:
    from fp8kv.calibrate.plan import estimate_seconds, plan_calibration
    from fp8kv.tables import effect_rows

    plan = plan_calibration(model, recipe, revision=revision, device=device)
    facts = plan.to_json(round(estimate_seconds(plan), 1))
    targets = facts.pop("targets")
    rows = [[key.replace("_", " "), _show(value)] for key, value in facts.items()]
    output.table("plan", ("what", "value"), rows)
    output.table("engines", ("engine", "scales", "why"), effect_rows(plan.effects))
    output.json({**facts, "targets": targets})


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
