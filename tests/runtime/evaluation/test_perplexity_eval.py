"""Perplexity under the arms: the paired ratio, and the section."""

import math

import pytest
import torch

from fp8kv.runtime.evaluation.perplexity import Perplexity
from fp8kv.runtime.evaluation.perplexity_eval import (
    PerplexityMeasurement,
    PerplexitySettings,
    ratio,
)
from fp8kv.runtime.llm import LoadedModel

TEXT = "Six apples cost 12 dollars, so one apple costs 12/6 = 2 dollars. " * 12


class Flat:
    """A model that holds all tokens equally likely, but for a bonus on the right one."""

    def __init__(self, bonus):
        self.bonus = bonus

    def teacher_forced(self, sequences):
        for number, (_, answer) in enumerate(sequences):
            logits = torch.zeros(len(answer), 4096)
            logits[torch.arange(len(answer)), torch.tensor(answer)] = self.bonus
            yield number, logits


@pytest.fixture(scope="module")
def loaded(minimax):
    return LoadedModel(minimax.model, minimax.tokenizer, None, minimax.checkpoint)


def measure(loaded, arms, context=64, progress=lambda *_: None):
    measurement = PerplexityMeasurement(
        PerplexitySettings("text.txt", TEXT, context), loaded, progress
    )
    for arm, bonus in arms.items():
        measurement.run(arm, Flat(bonus))
    return measurement.result()


def test_the_ratio_is_that_of_the_perplexities(loaded):
    section = measure(loaded, {"bf16": 1.0, "fp8": 0.5})
    plain, worse = section.arms["bf16"], section.arms["fp8"]
    assert plain.ratio is None
    assert worse.ratio.value == pytest.approx(worse.perplexity / plain.perplexity)
    assert worse.ratio.value > 1.5
    # the arms differ by the same in every window but for the tokens of the first and the last
    assert worse.ratio.ci_low <= worse.ratio.value <= worse.ratio.ci_high


def test_without_the_baseline_there_is_no_ratio(loaded):
    assert measure(loaded, {"fp8": 1.0}).arms["fp8"].ratio is None


def test_the_section_says_what_was_scored(loaded):
    told = []
    section = measure(loaded, {"bf16": 0.0}, progress=lambda *one: told.append(one))
    num_tokens = len(loaded.tokenizer(TEXT)["input_ids"])
    assert (section.data, section.context, section.stride) == ("text.txt", 64, 32)
    assert section.num_tokens == num_tokens - 1
    assert section.arms["bf16"].perplexity == pytest.approx(4096)
    assert section.arms["bf16"].nll == pytest.approx(math.log(4096))
    assert sum(count for _, count, _ in told) == told[0][2] > 5
    assert {task for task, _, _ in told} == {"perplexity with bf16"}
    assert measure(loaded, {"bf16": 0.0}, 65).protocol_digest != section.protocol_digest


def test_windows_are_2048_tokens_unless_the_user_says_otherwise(loaded):
    measurement = PerplexityMeasurement(PerplexitySettings("t", TEXT), loaded, lambda *_: None)
    measurement.run("bf16", Flat(0.0))
    assert measurement.result().context == 2048


def perplexity(*sums):
    tokens = 10 * len(sums)
    nll = sum(sums) / tokens
    return Perplexity(tokens, tokens, nll, 0.0, nll, sums)


def test_the_interval_sees_windows_that_differ():
    steady = ratio(perplexity(*[11.0] * 20), perplexity(*[10.0] * 20))
    uneven = ratio(perplexity(*[10.0, 12.0] * 10), perplexity(*[10.0] * 20))
    assert steady.value == uneven.value == pytest.approx(math.exp(0.1))
    assert steady.ci_low == steady.ci_high == pytest.approx(math.exp(0.1))
    assert uneven.ci_low < math.exp(0.08) < math.exp(0.12) < uneven.ci_high


def test_one_window_has_no_interval():
    one = ratio(perplexity(11.0), perplexity(10.0))
    assert one.value > 1
    assert (one.ci_low, one.ci_high) == (None, None)


def test_a_ruined_arm_has_an_infinite_ratio():
    assert ratio(perplexity(1e5), perplexity(1.0)).value == math.inf
