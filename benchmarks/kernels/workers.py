"""Processes that hold a GPU context each. They compile side by side; then one of them times, alone on the GPU.

A kernel that reads out of bounds spoils its process's context and one that hangs never returns. Either costs the process
and one shape: the next spare process goes on with the rest.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from .case import Case, Ceilings
from .timing import Clock, choose_copies

KERNELS = (
    "quantize",
    "cache_write",
    "mla_pack",
    "mla_pack_kv",
    "rope_quantize",
    "rope_cache_write",
    "gather",
    "decode_gqa",
    "decode_mla",
    "extend",
)
COMPILE, TIME, CEILINGS, LIST = "compile", "time", "ceilings", "list"


@dataclass(frozen=True)
class Job:
    """What a worker is asked for: an action, the case that it is about, and the ceilings to compare with."""

    action: str
    kernel: str = ""
    shape: str = ""
    ceilings: Ceilings | None = None


@dataclass(frozen=True)
class Answer:
    """What came back: a value, or one line that says what went wrong, and whether the worker is of use no more."""

    value: Any = None
    error: str | None = None
    is_last: bool = False


class Worker:
    """One process, one job at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    def ask(self, job: Job) -> None:
        """Send a job without waiting for it."""
        self.connection.send(job)

    def answer(self, timeout: float) -> Answer | None:
        """Return the answer, or ``None`` if the process died or did not answer in time; then it is gone."""
        try:
            if self.connection.poll(max(timeout, 0.0)):
                return self.connection.recv()
        except (EOFError, OSError):
            pass
        self.stop()
        return None

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def share_out(
    workers: list[Worker], jobs: Sequence[Job], until: float, report: Callable[[Job, Answer], None]
) -> list[Worker]:
    """Let all workers work on ``jobs`` until the clock (``time.monotonic``) says ``until``.

    Returns:
        The workers that are free again; one that is still at work then is ended.
    """
    waiting, busy, free = list(reversed(jobs)), {}, list(workers)
    while (waiting or busy) and time.monotonic() < until:
        while waiting and free:
            worker, job = free.pop(), waiting.pop()
            worker.ask(job)
            busy[worker.connection] = (worker, job)
        if not busy:
            break
        for connection in wait(list(busy), max(until - time.monotonic(), 0.0)):
            worker, job = busy.pop(connection)
            answer = worker.answer(1.0)
            report(job, answer or Answer(error="the process died"))
            if answer is not None and not answer.is_last:
                free.append(worker)
    for worker, job in busy.values():
        worker.stop()
        report(job, Answer(error="not compiled in time"))
    return free


def _serve(connection: Connection) -> None:
    """Answer jobs until the other end is closed. Runs in the worker's process."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send(Answer(_ACTIONS[job.action](job)))
        except Exception as error:  # noqa: BLE001  whatever a kernel raises is a result here
            spoilt = _is_spoilt()
            connection.send(Answer(error=_one_line(error), is_last=spoilt))
            if spoilt:
                return


def _list(job: Job) -> list[tuple[str, bool]]:
    return [(case.shape, case.target is not None) for case in _cases(job.kernel)]


def _compile(job: Job) -> None:
    _case(job).build(1, True).calls[0]()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _ceilings(job: Job) -> Ceilings:
    ceilings = _clock().ceilings()
    torch.cuda.empty_cache()
    return ceilings


def _time(job: Job) -> dict[str, Any]:
    """Time one case, and compare what it left with the reference."""
    case, ceilings = _case(job), job.ceilings
    if ceilings is None:
        raise ValueError("a time needs ceilings to be compared with")
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    problem = case.build(choose_copies(case, ceilings), False)
    time_us = _clock().time_us(problem.calls)
    floor_us = case.floor_us(ceilings)
    row = {
        "kernel": case.kernel,
        "shape": case.shape,
        "time_us": round(time_us, 3),
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_us": round(floor_us, 3),
        "fraction": round(floor_us / time_us, 4),
        "bound": case.bound(ceilings),
        "error": float(f"{problem.error():.3g}"),
    }
    if case.target is None:
        return row | {"target": None, "target_us": None}
    target_us = round(case.target.as_time_us(floor_us, case.flops), 3)
    return row | {"target": str(case.target), "target_us": target_us}


_ACTIONS = {LIST: _list, COMPILE: _compile, CEILINGS: _ceilings, TIME: _time}


@cache
def _clock() -> Clock:
    return Clock()


def _cases(kernel: str) -> list[Case]:
    return importlib.import_module(f"{__package__}.{kernel}").cases()


def _case(job: Job) -> Case:
    return next(case for case in _cases(job.kernel) if case.shape == job.shape)


def _is_spoilt() -> bool:
    """Say whether an earlier error has made this process's GPU context useless."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _one_line(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = f"{text[:100]} ... {text[-200:]}"  # a compiler quotes the source first and says why at the end
    return f"{type(error).__name__}: {text} ({place.name}:{place.lineno})"
