"""Time the kernels on the GPU at hand and write one JSON file.

    python -m benchmarks.kernels.run --out benchmarks/results
    python -m benchmarks.kernels.run --only decode_gqa --quick

Run at the root of the repository (``make bench`` does). ``--quick`` takes only the shapes with a target of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

from ..commit import commit_id
from .case import Ceilings
from .table import is_met
from .workers import CEILINGS, COMPILE, KERNELS, LIST, TIME, Answer, Job, Worker, share_out

COMPILE_SHARE = 0.4
CASE_SECONDS = 30.0
MOST_WORKERS = 12
SPARE_WORKERS = 2


def main() -> None:
    """Parse the command line, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file, or a folder for DATE-GPU-kernels.json")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--quick", action="store_true", help="only the shapes with a target")
    parser.add_argument("--seconds", type=float, default=150.0, help="stop timing after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"These are times of a GPU, and torch {torch.__version__} finds none.")
    result = measure(arguments.only, arguments.quick, arguments.seconds)
    if arguments.out:
        out = arguments.out
        if out.suffix != ".json":
            gpu = result["gpu"].lower().removeprefix("nvidia ").replace(" ", "-")
            out = out / f"{result['date']}-{gpu}-kernels.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_as_json(result))
    if result["failures"]:
        sys.exit(f"{len(result['failures'])} shapes have no time.")


def measure(kernels: Iterable[str], quick: bool, seconds: float) -> dict[str, Any]:
    """Compile side by side, then time one shape after the other; print each as it comes."""
    start = time.monotonic()
    head = _head()
    failures: list[dict[str, str]] = []
    workers = [Worker() for _ in range(min(MOST_WORKERS, max(2, (os.cpu_count() or 2) - 2)))]
    jobs = _list_jobs(workers, kernels, quick, failures)
    workers = _compile(workers, jobs, start + COMPILE_SHARE * seconds)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    for worker in workers[SPARE_WORKERS + 1 :]:
        worker.stop()
    ceilings, rows = _time(workers[: SPARE_WORKERS + 1], jobs, start + seconds, failures)
    took = round(time.monotonic() - start)
    print(f"{len(rows)} shapes in {took} s", flush=True)
    same = {name: head[name] for name in ("gpu", "torch", "triton", "commit")}
    return head | {
        "seconds": took,
        "ceilings": _rounded(ceilings),
        "rows": [row | same for row in rows],
        "failures": failures,
    }


def _list_jobs(
    workers: list[Worker], kernels: Iterable[str], quick: bool, failures: list[dict[str, str]]
) -> list[Job]:
    """Let a worker import each kernel's module, so that a broken one breaks only itself."""
    answers: dict[str, Answer] = {}
    listing = [Job(LIST, kernel) for kernel in kernels]
    until = time.monotonic() + 2 * CASE_SECONDS
    workers[:] = share_out(
        workers, listing, until, lambda job, answer: answers.update({job.kernel: answer})
    )
    jobs = []
    for kernel in kernels:
        if answers[kernel].error:
            _failed(failures, Job(LIST, kernel, "all"), answers[kernel].error)
        else:
            names = [name for name, has_target in answers[kernel].value if has_target or not quick]
            jobs += [Job(TIME, kernel, name) for name in names]
    return jobs


def _compile(workers: list[Worker], jobs: list[Job], until: float) -> list[Worker]:
    """Call every launcher once, on hardly any data; return the workers that are left."""
    seen = set()

    def report(job: Job, answer: Answer) -> None:
        if answer.error and (job.kernel, answer.error) not in seen:
            seen.add((job.kernel, answer.error))
            print(f"compiling {job.kernel} {job.shape}: {answer.error}", flush=True)

    # neighbours in the list share compiled kernels: dealt out in strides, they rarely wait for one another
    spread = [job for i in range(MOST_WORKERS) for job in jobs[i::MOST_WORKERS]]
    return share_out(workers, [replace(job, action=COMPILE) for job in spread], until, report)


def _time(
    workers: list[Worker], jobs: list[Job], until: float, failures: list[dict[str, str]]
) -> tuple[Ceilings | None, list[dict[str, Any]]]:
    """Let one worker time all jobs; when it is lost, the next goes on."""
    ceilings: Ceilings | None = None
    timer: Worker | None = None
    rows = []
    for job in jobs:
        if time.monotonic() > until:
            _failed(failures, job, "no time left")
            continue
        timer = timer or (workers.pop() if workers else Worker())
        ceilings = ceilings or _measure_ceilings(timer)
        timer.ask(replace(job, ceilings=ceilings))
        answer = timer.answer(CASE_SECONDS)
        if answer is None:
            _failed(failures, job, f"the process died, or was silent for {CASE_SECONDS:g} s")
        elif answer.error:
            _failed(failures, job, answer.error)
        else:
            rows.append(answer.value)
            print(_line(answer.value), flush=True)
        if answer is None or answer.is_last:
            timer = None
    for worker in [*workers, *([timer] if timer else [])]:
        worker.stop()
    return ceilings, rows


def _rounded(ceilings: Ceilings | None) -> dict[str, float] | None:
    if ceilings is None:
        return None
    return {name: round(value, 4) for name, value in asdict(ceilings).items()}


def _measure_ceilings(timer: Worker) -> Ceilings:
    timer.ask(Job(CEILINGS))
    answer = timer.answer(2 * CASE_SECONDS)
    if answer is None or answer.error:
        raise SystemExit(f"The ceilings cannot be measured: {answer and answer.error}")
    print(" ".join(f"{k} {v:.3f}" for k, v in asdict(answer.value).items()), flush=True)
    return answer.value


def _failed(failures: list[dict[str, str]], job: Job, why: str | None) -> None:
    failures.append({"kernel": job.kernel, "shape": job.shape, "why": why or "unknown"})
    print(f"{job.kernel:13} {job.shape:20} FAILED: {why}", flush=True)


def _head() -> dict[str, Any]:
    return {
        "benchmark": "kernels",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit_id(),
    }


def _as_json(result: dict[str, Any]) -> str:
    """Return the result as JSON with one line per shape, which a difference between two runs shows well."""
    lists = {name: result[name] for name in ("rows", "failures")}
    head = json.dumps({k: v for k, v in result.items() if k not in lists}, indent=1)
    parts = [
        f' "{name}": [{",".join(f"{chr(10)}  {json.dumps(entry)}" for entry in entries)}\n ]'
        for name, entries in lists.items()
    ]
    return ",\n".join([head.removesuffix("\n}"), *parts]) + "\n}\n"


def _line(row: dict[str, Any]) -> str:
    text = (
        f"{row['kernel']:13} {row['shape']:20} {row['time_us']:9.2f} us {100 * row['fraction']:5.1f} % "
        f"of {row['floor_us']:8.2f} ({row['bound']})  error {row['error']:.1e}"
    )
    if row["target_us"] is None:
        return text
    met = "met" if is_met(row) else "MISSED"
    return f"{text}  target {row['target']} {met}"


if __name__ == "__main__":
    main()
