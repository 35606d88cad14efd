"""``fp8kv inspect``."""

from __future__ import annotations

from dataclasses import asdict

import click

from fp8kv.options import output_options
from fp8kv.output import Output


@click.command("inspect", short_help="List the KV scales of any checkpoint.")
@click.argument("model")
@click.option("--revision", help="Revision of a hub id.")
@output_options
def inspect_command(model: str, revision: str | None, as_json: bool, quiet: bool) -> None:
    """List the KV scales of any checkpoint, whoever wrote them, and flag what looks wrong."""
    from fp8kv.calibrate.formats.checkpoint import open_checkpoint
    from fp8kv.calibrate.validation.inspection import FLAGS, inspect
    from fp8kv.tables import short_names

    output = Output(as_json=as_json, quiet=quiet)
    inspection = inspect(open_checkpoint(model, revision))
    if inspection.rows:
        pattern, short = short_names([row.layer for row in inspection.rows])
        output.table(
            f"KV scales of {model} ({inspection.attention or 'unknown attention'})"
            + (f", layers {pattern}" if pattern else ""),
            ("layer", "spelling", "k_scale", "v_scale", "flags"),
            [
                [
                    short[row.layer],
                    row.style.replace("{}", "{k,v}"),
                    _range(row.k),
                    _range(row.v),
                    ", ".join(row.flags),
                ]
                for row in inspection.rows
            ],
        )
    raised = dict.fromkeys(
        [*inspection.flags, *(flag for row in inspection.rows for flag in row.flags)]
    )
    for flag in raised:
        output.data(f"{flag}: {FLAGS[flag]}")
    if not raised:
        output.data(f"{len(inspection.rows)} layers, nothing suspicious")
    output.json({"model": model, **asdict(inspection)})


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return "-"
    low, high = values
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
