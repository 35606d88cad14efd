"""``fp8kv strip``."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp8kv.options import output_options
from fp8kv.output import Output

if TYPE_CHECKING:
    from fp8kv.calibrate.overlay.strip import StripReport


@click.command("strip", short_help="Take the scales out of a checkpoint again.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--keep-stats",
    type=click.Path(path_type=Path),
    help="Save the statistics in this file first; scales can be derived from it again.",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask before statistics are deleted.")
@output_options
def strip_command(
    directory: Path, keep_stats: Path | None, yes: bool, as_json: bool, quiet: bool
) -> None:
    """Take the scales out of DIRECTORY again: config and index become what they were.

    The statistics in its folder fp8kv are deleted too, unless --keep-stats names a file for them. They are what a
    calibration takes its time for.
    """
    from fp8kv.calibrate.overlay.manifest import SIDE_FOLDER
    from fp8kv.calibrate.stats_file import FILE_NAME

    output = Output(as_json=as_json, quiet=quiet)
    statistics = directory / SIDE_FOLDER / FILE_NAME
    if keep_stats is not None:
        report = _strip_but_keep(directory, statistics, keep_stats)
    else:
        _warn(statistics, output, ask=not yes)
        report = _strip(directory)
    restored = ", ".join(report.restored) or "nothing"
    output.say(f"restored {restored}; removed {len(report.removed)} files that fp8kv had added")
    if report.kept:
        output.say(f"kept, for fp8kv did not write them: {', '.join(report.kept)}")
    if keep_stats is not None:
        output.say(f"the statistics are in {keep_stats}")
    output.data(str(report.directory))
    kept_stats = None if keep_stats is None else str(keep_stats)
    output.json({**asdict(report), "directory": str(report.directory), "statistics": kept_stats})


def _strip(directory: Path) -> StripReport:
    from fp8kv.calibrate.overlay.strip import strip

    return strip(directory)


def _strip_but_keep(directory: Path, statistics: Path, kept: Path) -> StripReport:
    """Copy the statistics out, then strip; where stripping is refused, the copy goes again."""
    from fp8kv.recipes.errors import OutputError

    if not statistics.is_file():
        raise OutputError(f"there is no {statistics} to keep; leave out --keep-stats")
    try:
        with kept.open("xb") as target, statistics.open("rb") as source:
            shutil.copyfileobj(source, target)
    except FileExistsError:
        raise OutputError(f"{kept} exists; name another file for the statistics") from None
    except OSError as error:
        kept.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {kept}: {error.strerror or error}; nothing was stripped"
        ) from error
    try:
        return _strip(directory)
    except BaseException:
        if statistics.is_file():
            kept.unlink()
        raise


def _warn(statistics: Path, output: Output, *, ask: bool) -> None:
    """Say that the statistics go; somebody at a terminal may still say no."""
    if not statistics.is_file():
        return
    output.say(f"warning: {statistics} is deleted too; --keep-stats FILE keeps it")
    asked = ask and not output.quiet and sys.stdin.isatty()
    if asked and not click.confirm("go on?", err=True):
        output.say("nothing was changed")
        raise click.Abort
