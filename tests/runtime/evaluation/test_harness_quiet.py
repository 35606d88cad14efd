"""Keeping the harness still, and giving everything back."""

import logging
from types import SimpleNamespace

import pytest

from fp8kv.runtime.evaluation.harness_quiet import quiet_harness

datasets = pytest.importorskip("datasets")


def refuse(*arguments, **options):
    raise AssertionError


@pytest.fixture
def harness():
    return SimpleNamespace(
        evaluator=SimpleNamespace(add_env_info=refuse, get_git_commit_hash=refuse),
        task=SimpleNamespace(tqdm=refuse),
        model=SimpleNamespace(tqdm=refuse),
    )


def test_nothing_is_shown_or_looked_up_meanwhile(harness, caplog):
    with quiet_harness(harness):
        assert list(harness.task.tqdm([1, 2], total=2)) == [1, 2]
        assert list(harness.model.tqdm([1], desc="Tokenizing", disable=False)) == [1]
        assert harness.evaluator.get_git_commit_hash() is None
        harness.evaluator.add_env_info({})
        logging.getLogger("lm_eval.api").warning("nobody need know")
        logging.getLogger("lm_eval.api").error("somebody must know")
        assert datasets.are_progress_bars_disabled()
    assert caplog.messages == ["somebody must know"]


def test_everything_is_as_it_was_afterwards_whatever_happened(harness):
    level = logging.getLogger("lm_eval").level
    bars = datasets.are_progress_bars_disabled()
    with pytest.raises(KeyboardInterrupt), quiet_harness(harness):
        raise KeyboardInterrupt
    assert harness.task.tqdm is harness.model.tqdm is refuse
    assert harness.evaluator.add_env_info is harness.evaluator.get_git_commit_hash is refuse
    assert logging.getLogger("lm_eval").level == level
    assert datasets.are_progress_bars_disabled() == bars
