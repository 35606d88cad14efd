"""``fp8kv serve``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8kv.output import Output
from fp8kv.recipes.errors import Fp8kvError

if TYPE_CHECKING:
    import socket

    from fp8kv.runtime.llm import LLM
    from fp8kv.runtime.server.settings import ServerSettings

_EXTRA = ("fastapi", "starlette", "uvicorn", "prometheus_client")


@click.command("serve", short_help="Serve a checkpoint over HTTP, as OpenAI's API.")
@click.argument("model")
@click.option("--revision", help="Revision of a hub id.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free."
)
@click.option(
    "--api-key",
    envvar="FP8KV_API_KEY",
    show_envvar=True,
    help="Key that clients must show; other users of this machine see it here, and not in the variable.",
)
@click.option("--served-model-name", help="Name that clients ask for.  [default: MODEL's own]")
@click.option(
    "--cache",
    type=click.Choice(["fp8", "fp8-unit", "bf16", "emulate"]),
    default="fp8",
    show_default=True,
    help="fp8 with the checkpoint's scales, at scale 1.0, unquantised, or quantised and back.",
)
@click.option(
    "--backend",
    type=click.Choice(["reference", "triton"]),
    help="Attention kernels.  [default: triton on a GPU]",
)
@click.option(
    "--prefill",
    type=click.Choice(["fp8", "bf16"]),
    default="fp8",
    show_default=True,
    help="What a prompt's own tokens are attended as.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of weights and arithmetic; auto: the checkpoint's on a GPU, float32 on a CPU.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--page-size",
    type=click.IntRange(min=1),
    help="Tokens of a cache page, a power of two.  [default: 64]",
)
@click.option(
    "--num-pages", type=click.IntRange(min=1), help="Pages of the cache.  [default: by the memory]"
)
@click.option(
    "--memory-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    help="Of a GPU's memory for weights and cache, where --num-pages is not given.  [default: 0.9]",
)
@click.option(
    "--max-sequences",
    type=click.IntRange(min=1),
    help="Sequences continued at one time.  [default: 256]",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    help="Tokens of a forward pass.  [default: 8192]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    help="Sequences that may wait beside these.  [default: 1024]",
)
@click.option(
    "--max-body-bytes",
    type=click.IntRange(min=1),
    help="Bytes of a request's body.  [default: 16777216]",
)
@click.option(
    "--shutdown-timeout",
    "shutdown_seconds",
    type=click.FloatRange(min=0),
    help="Seconds that running requests have when the server is told to stop.  [default: 30]",
)
@click.option(
    "--count-clipped", is_flag=True, help="Show at /metrics what the cache clips and flushes."
)
@click.option("--no-cuda-graphs", is_flag=True, help="Run every step eagerly.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Let the checkpoint run Python code of its own."
)
@click.option("--quiet", "-q", is_flag=True, help="Only warnings and errors.")
def serve_command(
    model: str,
    host: str,
    port: int,
    served_model_name: str | None,
    no_cuda_graphs: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve MODEL over HTTP as OpenAI's API does: completions, chat, models; and /health and /metrics.

    It ends on SIGINT or SIGTERM when what runs is done. Without --api-key everybody who reaches the address may ask.
    """
    from fp8kv.calibrate.formats.checkpoint import open_checkpoint

    try:
        from fp8kv.runtime.server.launch import bind, is_loopback, serve
        from fp8kv.runtime.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise Fp8kvError(
            f'{error.name} is missing, which fp8kv serve needs: pip install "fp8kv[serve]"'
        ) from None
    output = Output(quiet=quiet)
    given = {name: value for name, value in options.items() if value is not None}
    settings = ServerSettings(
        model=served_model_name or _own_name(model),
        **{
            name: given.pop(name)
            for name in ("api_key", "max_queue", "max_body_bytes", "shutdown_seconds")
            if name in given
        },
    )
    # what is wrong with the address is said before the model is loaded
    opened = bind(host, port)
    try:
        if settings.api_key is None and not is_loopback(opened):
            click.echo(
                f"warning: {host} is reached from other machines, and without --api-key by everybody on them",
                err=True,
            )
        # a hub id is downloaded here, while the hub client has the terminal to itself
        open_checkpoint(model, given.get("revision"))
        with output.progress() as bars:
            bars.stage("load")
            llm = _load(model, bars.advance, cuda_graphs=not no_cuda_graphs, **given)
        with llm:
            started = _started(
                llm, settings, opened, cache=given["cache"], page_size=given.get("page_size")
            )
            num_cut_short = serve(llm, settings, opened, say=output.say, started=started)
    finally:
        opened.close()
    if num_cut_short:
        raise Fp8kvError(
            f"{num_cut_short} requests were cut short: give them longer with --shutdown-timeout"
        )


def _load(
    model: str,
    progress: Callable[[int, int], None],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    **options: Any,
) -> LLM:
    from fp8kv.runtime.llm import LLM, load

    loaded = load(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    return LLM(loaded, **options)


def _own_name(model: str) -> str:
    """Return the name of a directory, not where it lies; a hub id is its own name."""
    return Path(model).resolve().name if Path(model).exists() else model


def _started(
    llm: LLM, settings: ServerSettings, opened: socket.socket, *, cache: str, page_size: int | None
) -> str:
    from fp8kv.runtime.runner_builder import PAGE_SIZE
    from fp8kv.runtime.server.launch import url

    return (
        f"{url(opened)}/v1 serves {settings.model}: {cache} cache, backend {llm.backend} on {llm.device}, "
        f"{llm.engine.status.num_pages} pages of {page_size or PAGE_SIZE} tokens; at most {llm.max_length} tokens "
        f"a request, {llm.limits.max_sequences} sequences at a time and {settings.max_queue} waiting, "
        f"{settings.max_body_bytes} bytes a body"
    )
