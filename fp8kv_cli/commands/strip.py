"""``fp8kv strip``."""

from __future__ import annotations

from pathlib import Path

import click

from fp8kv.options import output_options
from fp8kv.output import Output


@click.command("strip")
@click.argument("directory", type=click.Path(path_type=Path))
@output_options
def strip_command(directory: Path, as_json: bool, quiet: bool) -> None:
    """Take the scales out of DIRECTORY again: config and index become what they were."""
    from fp8kv.calibrate.overlay.strip import strip

    output = Output(as_json=as_json, quiet=quiet)
    report = strip(directory)
    output.data(str(report.directory))
    output.json({"directory": str(report.directory)})
