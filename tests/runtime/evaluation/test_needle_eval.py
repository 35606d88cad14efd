"""Retrieval under the arms: prompts, the paired comparison, and the section."""

import dataclasses

import pytest
import torch

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.needle_eval import NeedleMeasurement, NeedleSettings
from fp8kv.runtime.llm import LoadedModel
from fp8kv.runtime.requests import Choice, Completion

SETTINGS = NeedleSettings(lengths=(256, 300), depths=(0.0, 1.0))


@pytest.fixture(scope="module")
def loaded(minimax):
    return LoadedModel(minimax.model, minimax.tokenizer, None, minimax.checkpoint)


class Finder:
    """A model that finds the keys of the first so many prompts."""

    def __init__(self, measurement, count):
        prompts = measurement._plan.prompts
        self.keys = {one.token_ids: one.key for one in prompts[:count]}

    def generate(self, prompts, parameters):
        return [
            Completion(ids, (Choice(f" {self.keys.get(ids, 'lost')}.", (), (), "stop"),))
            for ids in map(tuple, prompts)
        ]

    def teacher_forced(self, sequences):
        for number, (_, answer) in enumerate(sequences):
            yield number, torch.zeros(len(answer), 4096)


def test_the_arms_are_compared_prompt_by_prompt(loaded):
    told = []
    measurement = NeedleMeasurement(SETTINGS, loaded, lambda *one: told.append(one))
    measurement.run("bf16", Finder(measurement, 4))
    measurement.run("fp8", Finder(measurement, 3))

    section = measurement.result()

    assert (section.lengths, section.depths, section.n) == ((256, 300), (0.0, 1.0), 4)
    plain, worse = section.arms["bf16"], section.arms["fp8"]
    assert plain.comparison is None
    assert (plain.recall.value, worse.recall.value) == (1.0, 0.75)
    assert (worse.comparison.only_b, worse.comparison.both_right) == (1, 3)
    assert [(cell.length, cell.depth, cell.found) for cell in worse.cells] == [
        (256, 0.0, 1), (256, 1.0, 1), (300, 0.0, 1), (300, 1.0, 0)
    ]  # fmt: skip
    assert {(task, total) for task, _, total in told} == {
        ("needles with bf16", 4),
        ("needles with fp8", 4),
    }


def test_without_the_baseline_there_is_no_comparison(loaded):
    measurement = NeedleMeasurement(SETTINGS, loaded, lambda *_: None)
    measurement.run("fp8", Finder(measurement, 4))
    assert measurement.result().arms["fp8"].comparison is None


def test_the_digest_changes_with_the_prompts(loaded):
    def digest(settings):
        return NeedleMeasurement(settings, loaded, lambda *_: None).result().protocol_digest

    plain = digest(SETTINGS)
    assert digest(SETTINGS) == plain
    assert digest(dataclasses.replace(SETTINGS, depths=(0.0, 0.5))) != plain
    assert digest(dataclasses.replace(SETTINGS, haystack="Another text. " * 50)) != plain


def test_lengths_go_up_to_the_models(loaded):
    measurement = NeedleMeasurement(NeedleSettings(depths=(0.0,)), loaded, lambda *_: None)
    assert measurement.result().lengths == (512, 1024, 2048, 4096)


def test_a_context_beyond_the_models_is_refused(loaded):
    with pytest.raises(EvaluationError, match="5000 tokens exceeds the model's 4096 positions"):
        NeedleMeasurement(NeedleSettings(lengths=(512, 5000)), loaded, lambda *_: None)


def test_a_model_without_a_limit_needs_lengths(loaded, monkeypatch):
    monkeypatch.setattr("fp8kv.runtime.evaluation.needle_eval.max_positions", lambda _model: None)
    with pytest.raises(EvaluationError, match=r"give the lengths \(--lengths\)"):
        NeedleMeasurement(NeedleSettings(), loaded, lambda *_: None)
    NeedleMeasurement(SETTINGS, loaded, lambda *_: None)
