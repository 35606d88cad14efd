"""``fp8kv stats``."""

from __future__ import annotations

from pathlib import Path

import click

from fp8kv.options import output_options
from fp8kv.output import Output


@click.group("stats")
def stats_group() -> None:
    """Work with statistics files."""


@stats_group.command("merge")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@output_options
def merge_command(inputs: tuple[Path, ...], out: Path, as_json: bool, quiet: bool) -> None:
    """Merge statistics of different data of one checkpoint into one file; the order does not matter."""
    if len(inputs) < 2:
        raise click.UsageError("name at least two statistics files")
    from fp8kv.calibrate.stats_file import load_statistics, save_statistics
    from fp8kv.recipes.errors import OutputError

    output = Output(as_json=as_json, quiet=quiet)
    if out.exists():
        raise OutputError(f"{out} exists; name another file")
    merged = load_statistics(inputs[0])
    for path in inputs[1:]:
        merged = merged.merge(load_statistics(path))
    save_statistics(merged, out)
    tokens, samples = int(merged.tokens.sum()), int(merged.samples.sum())
    output.say(f"{tokens:,} tokens of {samples:,} samples from {len(inputs)} files")
    output.data(str(out))
    output.json({"out": str(out), "tokens": tokens, "samples": samples})
