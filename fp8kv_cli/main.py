"""The command group and the one place where errors become messages.

Exit status: 0 done, 1 findings, 2 usage, 3 could not be done (one sentence on stderr), 130 interrupted, and 141
where the reader of a pipe went away, as for any program.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from fp8kv import __version__
from fp8kv.commands.calibrate import calibrate_command
from fp8kv.commands.demo import demo_command
from fp8kv.commands.eval import eval_command
from fp8kv.commands.inspect import inspect_command
from fp8kv.commands.recipes import recipes_group
from fp8kv.commands.scales import scales_command
from fp8kv.commands.serve import serve_command
from fp8kv.commands.stats import stats_group
from fp8kv.commands.strip import strip_command
from fp8kv.commands.validate import validate_command
from fp8kv.options import RESUME_KEY
from fp8kv.recipes.errors import Fp8kvError

EXIT_ERROR = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _Group(click.Group):
    """A group that lists commands in the order of a user's work, and turns our errors into one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Fp8kvError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(EXIT_ERROR)
        except (KeyboardInterrupt, click.Abort):
            resume = ctx.meta.get(RESUME_KEY)
            click.echo(f"interrupted; {resume}" if resume else "interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # what is still buffered has no reader either, and would raise again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_BROKEN_PIPE)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fp8kv", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def cli(debug: bool) -> None:
    """Calibrate FP8 KV-cache scales, write them into checkpoints that engines load, and prove them.

    \b
    fp8kv demo                        see all of it on two small embedded models
    fp8kv calibrate MODEL --out DIR   measure, choose scales, write a checkpoint
    fp8kv eval DIR --gsm8k            compare it with the unquantised cache
    """  # noqa: D301  click wants the character, not a backslash and a b


for _command in (
    demo_command,
    calibrate_command,
    scales_command,
    stats_group,
    validate_command,
    inspect_command,
    eval_command,
    serve_command,
    strip_command,
    recipes_group,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; the ``fp8kv`` script and ``python -m fp8kv``."""
    sys.exit(cli(prog_name="fp8kv", standalone_mode=True))
