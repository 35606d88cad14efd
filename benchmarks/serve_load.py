"""Load a running server on this machine: many clients that come, ask in every way, and go, some of them in the middle.

    python -m benchmarks.serve_load [--url http://127.0.0.1:8000 | --model DIR] [--clients 200] [--seconds 120]

Without ``--url`` it starts ``fp8kv serve`` itself. It fails, with exit status 1, on any answer that the server's limits
do not promise, on pages that are not free again at the end, and on memory that grew beyond ``--growth-mib``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx

from benchmarks.serve_clients import Tally, one_client

SETTLING_SECONDS = 30
MIB = 1 << 20


async def load(url, model, *, num_clients, seconds, seed=0, key="any"):
    """Run the clients for so long; return the tally and the server's metrics before, halfway and after."""
    limits = httpx.Limits(max_connections=num_clients + 4, max_keepalive_connections=num_clients)
    headers = {"Authorization": f"Bearer {key}"}
    tally = Tally()
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=300, headers=headers
    ) as client:
        before = await read_metrics(client)
        end = time.monotonic() + seconds
        clients = [
            asyncio.create_task(one_client(client, model, end, random.Random(seed + n), tally))
            for n in range(num_clients)
        ]
        await asyncio.sleep(seconds / 2)
        halfway = await read_metrics(client)
        await asyncio.gather(*clients)
        after = await settle(client)
    return tally, before, halfway, after


async def read_metrics(client):
    """The server's metrics that have no labels, by name."""
    response = await client.get("/metrics")
    response.raise_for_status()
    rows = (line.rsplit(" ", 1) for line in response.text.splitlines() if "{" not in line)
    return {name: float(value) for name, value in rows if not name.startswith("#")}


async def settle(client):
    """The metrics when nothing is under way any more, or when the patience is at its end."""
    end = time.monotonic() + SETTLING_SECONDS
    while True:
        metrics = await read_metrics(client)
        if is_idle(metrics) or time.monotonic() > end:
            return metrics
        await asyncio.sleep(0.1)


def is_idle(metrics):
    return (
        metrics["fp8kv_cache_free_pages"] == metrics["fp8kv_cache_pages"]
        and not metrics["fp8kv_open_requests"]
        and not metrics["fp8kv_running_sequences"]
        and not metrics["fp8kv_waiting_sequences"]
    )


def report(tally, before, halfway, after, seconds):
    """The table."""
    resident = "process_resident_memory_bytes"
    lines = ["| request | answer | count |", "| --- | --- | ---: |"]
    lines += [
        f"| {kind} | {answer} | {n} |"
        for (kind, answer), n in sorted(tally.answers.items(), key=str)
    ]
    lines += ["", "| | |", "| --- | ---: |"]
    rows = {
        "requests answered": sum(tally.answers.values()),
        "generated tokens per second": round(
            (after["fp8kv_generated_tokens_total"] - before["fp8kv_generated_tokens_total"])
            / seconds
        ),
        "preemptions": round(after["fp8kv_preemptions_total"] - before["fp8kv_preemptions_total"]),
        "seconds, median": _quantile(tally.seconds, 0.5),
        "seconds, 99th percentile": _quantile(tally.seconds, 0.99),
        "to the first event, median": _quantile(tally.first_seconds, 0.5),
        "to the first event, 99th percentile": _quantile(tally.first_seconds, 0.99),
        "cache pages free at the end": f"{after['fp8kv_cache_free_pages']:.0f} of "
        f"{after['fp8kv_cache_pages']:.0f}",
        "resident MiB before, halfway, after": ", ".join(
            str(round(one[resident] / MIB)) for one in (before, halfway, after)
        ),
        "open files before, after": f"{before['process_open_fds']:.0f}, "
        f"{after['process_open_fds']:.0f}",
    }
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(lines)


def findings(tally, halfway, after, growth_mib):
    """What must not be."""
    found = list(tally.unexpected)
    if not is_idle(after):
        found.append(f"not idle at the end: {after}")
    resident = "process_resident_memory_bytes"
    # the first half warms caches of torch, of the tokenizer and of the allocator
    growth = (after[resident] - halfway[resident]) / MIB
    if growth > growth_mib:
        found.append(f"memory grew by {growth:.0f} MiB in the second half")
    return found


def _quantile(values, share):
    return f"{sorted(values)[int(share * (len(values) - 1))]:.2f}" if values else "-"


@contextmanager
def started(model, arguments):
    """Run ``fp8kv serve`` on a free port; give its URL."""
    command = [sys.executable, "-P", "-m", "fp8kv", "serve", model, "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
                if match := re.match(r"(http://\S+)/v1 serves", line):
                    yield match[1]
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            process.terminate()
            process.communicate()
    if process.returncode:
        raise SystemExit(f"the server ended with status {process.returncode}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a running server; without it one is started")
    parser.add_argument("--model", help="that is started  [default: the demo's tiny-minimax-m2]")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--growth-mib", type=float, default=64)
    parser.add_argument("server", nargs="*", help="options of fp8kv serve, behind --")
    options = parser.parse_args()
    if options.url:
        host = urlsplit(options.url).hostname
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise SystemExit(f"{host} is not this machine, and this is no load for another")
        return run(options.url, options)
    if options.model is None:
        from fp8kv.demo import MODELS

        options.model = str(MODELS["tiny-minimax-m2"])
        options.server = options.server or ["--cache", "fp8-unit"]
    with started(options.model, options.server) as url:
        return run(url, options)


def run(url, options):
    headers = {"Authorization": f"Bearer {os.environ.get('FP8KV_API_KEY', 'any')}"}
    model = httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"]
    tally, before, halfway, after = asyncio.run(
        load(
            url,
            model,
            num_clients=options.clients,
            seconds=options.seconds,
            key=os.environ.get("FP8KV_API_KEY", "any"),
        )
    )
    print(f"{options.clients} clients, {options.seconds:g} seconds\n")
    print(report(tally, before, halfway, after, options.seconds))
    found = findings(tally, halfway, after, options.growth_mib)
    print("\n" + ("\n".join(found) or "nothing that the limits do not promise"))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
