"""``fp8kv validate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fp8kv.options import output_options
from fp8kv.output import Output


class _ListsChecks(click.Command):
    """A command whose help lists the checks; they are looked up when somebody asks."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fp8kv.calibrate.validation.validate import describe_checks

        with formatter.section("Checks"):
            formatter.write_dl(describe_checks())


@click.command("validate", cls=_ListsChecks, short_help="Check the KV scales of a checkpoint.")
@click.argument("directory", type=click.Path(path_type=Path))
@output_options
@click.pass_context
def validate_command(ctx: click.Context, directory: Path, as_json: bool, quiet: bool) -> None:
    """Check the KV scales of the checkpoint in DIRECTORY, one line per check that ran.

    Exit status: 0 clean, 1 findings, 2 usage, 3 could not be checked.
    """
    from fp8kv.calibrate.stats_file import read_absmax
    from fp8kv.calibrate.validation.validate import validate

    output = Output(as_json=as_json, quiet=quiet)
    checks = validate(directory, read_absmax)
    for check in checks:
        if not quiet:
            output.data(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    findings = sum(not check.passed for check in checks)
    output.say(f"{len(checks)} checks, {findings} findings")
    output.json({"directory": str(directory), "checks": [asdict(check) for check in checks]})
    ctx.exit(1 if findings else 0)
