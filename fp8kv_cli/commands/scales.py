"""``fp8kv scales``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fp8kv.options import (
    link_option,
    output_options,
    scale_options,
    scale_overrides,
    target_option,
)
from fp8kv.output import Output


@click.command("scales", short_help="Derive other scales from statistics.")
@click.option(
    "--from",
    "stats_path",
    required=True,
    type=click.Path(path_type=Path),
    help="A kv-stats.safetensors.",
)
@click.option("--recipe", "recipe_name", help="Built-in recipe or YAML file.  [default: default]")
@scale_options
@target_option
@click.option("--model", help="Checkpoint that was measured; needed with --out.")
@click.option("--revision", help="Revision of a hub id.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write a checkpoint to this directory."
)
@link_option
@output_options
def scales_command(
    stats_path: Path,
    recipe_name: str | None,
    model: str | None,
    revision: str | None,
    out: Path | None,
    link: str,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Derive scales again from statistics: another estimator, granularity, format or engine.

    Needs no GPU and does not run the model. With --model and --out it writes a checkpoint.
    """
    if (out is None) != (model is None):
        raise click.UsageError("--model and --out go together: what to convert, and where to")
    from fp8kv.calibrate.derive import derive_scales
    from fp8kv.calibrate.pipeline import result_json, write_from_statistics
    from fp8kv.calibrate.stats_file import load_statistics
    from fp8kv.calibrate.verdicts import convergence, judge
    from fp8kv.commands.calibrate import show_effects
    from fp8kv.recipes import default_recipe, load_recipe, override
    from fp8kv.tables import (
        VERDICT_COLUMNS,
        VERDICT_LEGEND,
        verdict_rows,
        verdict_sentence,
        verdict_title,
    )

    output = Output(as_json=as_json, quiet=quiet)
    recipe = override(
        default_recipe() if recipe_name is None else load_recipe(recipe_name),
        scale_overrides(values),
    )
    stats = load_statistics(stats_path)
    scales = derive_scales(stats, recipe.scales)
    verdicts = judge(stats, scales)
    output.table(
        verdict_title(f"KV cache of {stats.provenance.model}", verdicts),
        VERDICT_COLUMNS,
        verdict_rows(verdicts),
        VERDICT_LEGEND,
    )
    output.say(verdict_sentence(verdicts))
    written: dict[str, Any] = {}
    if model is not None and out is not None:
        effects = write_from_statistics(
            stats,
            recipe.scales,
            model=model,
            out=out,
            targets=recipe.output.targets,
            recipe=recipe,
            revision=revision,
            link=link,  # type: ignore[arg-type]
        )
        show_effects(effects, out, recipe, output)
        output.data(str(out))
        written = {"out": str(out), "targets": [asdict(effect) for effect in effects]}
    output.json({**written, **result_json(scales, verdicts, convergence(stats, recipe.scales))})
