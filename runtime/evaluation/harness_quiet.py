"""Keep lm-evaluation-harness still while it works: the report says what a user must know."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any


@contextmanager
def quiet_harness(harness: SimpleNamespace) -> Iterator[None]:
    """Turn the harness' warnings and bars off, and what it adds to its report and nobody here reads.

    That is the machine's description, which takes seconds, and the commit of the folder that the user happens to be in,
    for which git complains on the terminal where there is none.

    Args:
        harness: of :func:`fp8kv.runtime.evaluation.harness_model.import_harness`.
    """
    import datasets  # noqa: PLC0415  takes a second, and came with the harness

    logger = logging.getLogger("lm_eval")
    level = logger.level
    with ExitStack() as stack:
        for module, name, other in (
            (harness.evaluator, "add_env_info", lambda _results: None),
            (harness.evaluator, "get_git_commit_hash", lambda: None),
            (harness.task, "tqdm", lambda items, **_options: items),
            (harness.model, "tqdm", lambda items, **_options: items),
        ):
            stack.enter_context(_replaced(module, name, other))
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, level)
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
