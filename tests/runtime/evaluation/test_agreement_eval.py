"""Agreement of the arms with the baseline: against the emulated cache, in groups, and in windows."""

import contextlib

import pytest
import torch

from fp8kv.demo import TEST_DATA, TRAIN_DATA
from fp8kv.recipes.errors import DataError, EvaluationError
from fp8kv.runtime.cache_scales import CacheScales
from fp8kv.runtime.evaluation import agreement_eval
from fp8kv.runtime.evaluation.agreement import measure_agreement
from fp8kv.runtime.evaluation.agreement_eval import (
    AgreementMeasurement,
    AgreementSettings,
    answer_rows,
    compare_arms,
    separate_windows,
)
from fp8kv.runtime.evaluation.arms import EngineOptions, arm_opener
from fp8kv.runtime.evaluation.emulated_cache import CacheMode, emulated_cache, fp8_at_unit_scale
from fp8kv.runtime.evaluation.gsm8k import build_prompts, load_problems, reference_continuation
from fp8kv.runtime.evaluation.teacher_forcing import answer_logits, encode_answers, force
from fp8kv.runtime.llm import LoadedModel

ARMS = ("bf16", "fp8-unit", "fp8", "emulate")
SCALE = 2.0**-10  # clips much, so that the arms differ


@pytest.fixture(scope="module")
def forced():
    """Two prompts with their answers."""
    problems = load_problems(TEST_DATA)[:2]
    prompts = build_prompts(problems, load_problems(TRAIN_DATA), 1)
    return prompts, [reference_continuation(problem) for problem in problems]


@pytest.fixture(scope="module", params=["minimax", "deepseek"])
def subject(request):
    """A trained model with scales that clip."""
    tested = request.getfixturevalue(request.param)
    scale = torch.tensor([SCALE])
    layers = {layer.name: (scale, scale) for layer in tested.facts.layers}
    loaded = LoadedModel(
        tested.model, tested.tokenizer, CacheScales("e4m3fn", layers), tested.checkpoint
    )
    return tested, loaded, layers


@pytest.fixture(scope="module")
def sequences(minimax, forced):
    prompts, answers = forced
    heads = minimax.tokenizer(prompts)["input_ids"]
    return list(zip(heads, encode_answers(minimax.tokenizer, answers), strict=True))


def test_every_arm_agrees_as_the_unmodified_model_with_an_emulated_cache_does(
    subject, forced, sequences
):
    tested, loaded, layers = subject
    batch = force(tested.tokenizer, *forced)
    plain = answer_logits(tested.model, batch)
    clipping = CacheMode("fp8", fp8_at_unit_scale().fmt, layers)

    found = compare_arms(arm_opener(loaded, EngineOptions()), ARMS, sequences, rows=10**6)

    assert list(found) == list(ARMS)
    assert (found["bf16"].total.kl_sum, found["bf16"].total.kl_max) == (0.0, 0.0)
    for arms, mode in ((("fp8-unit",), fp8_at_unit_scale()), (("fp8", "emulate"), clipping)):
        with emulated_cache(tested.model, tested.facts, mode):
            logits = answer_logits(tested.model, batch)
        expected = measure_agreement(logits, plain, batch.reference_tokens).summary()
        for arm in arms:
            summary = found[arm].total.summary()
            assert summary.num_tokens == expected.num_tokens
            # where rounding lets a value fall on the other side of a code, what follows differs
            assert summary.kl == pytest.approx(expected.kl, rel=0.1)
            assert summary.nll == pytest.approx(expected.nll, rel=0.005)
            assert summary.top1_baseline == pytest.approx(expected.top1_baseline, abs=0.02)
    assert found["fp8"].total.summary().kl > 0.1 > found["fp8-unit"].total.summary().kl > 0


class Fake:
    """Arms whose logits depend on arm and text alone, and which can be open one at a time."""

    def __init__(self):
        self.opened = []
        self.is_open = False
        self.held = self.most_held = 0

    @contextlib.contextmanager
    def __call__(self, arm, num_pages=None):
        assert not self.is_open, "one arm at a time"
        self.is_open = True
        self.opened.append((arm, num_pages))
        self.arm = arm
        if arm == "bf16":
            self.held = 0
        yield self
        self.is_open = False

    def teacher_forced(self, group):
        for number, (prompt, answer) in enumerate(group):
            generator = torch.Generator().manual_seed(sum(prompt) + 7 * len(answer))
            logits = torch.randn(len(answer), 128, generator=generator)
            if self.arm != "bf16":
                logits += 0.1 * torch.randn(len(answer), 128, generator=generator)
            else:
                self.held += len(answer)
                self.most_held = max(self.most_held, self.held)
            # a long answer comes in pieces
            for piece in logits.split(3):
                yield number, piece


SHORT = [([1] * length, [2, 3, 4, 5][: 1 + length % 4]) for length in range(1, 200, 13)]


@pytest.mark.parametrize("rows", [1, 5, 10**6])
def test_groups_change_nothing_but_what_is_held(rows):
    whole, parted = Fake(), Fake()
    told = []
    expected = compare_arms(whole, ("bf16", "fp8"), SHORT, rows=10**6)

    found = compare_arms(parted, ("bf16", "fp8"), SHORT, rows=rows, progress=told.append)

    assert [one.first for one in found["fp8"].buckets] == [0, 128]
    for arm, own in expected.items():
        assert found[arm].total.num_tokens == own.total.num_tokens == sum(len(a) for _, a in SHORT)
        assert found[arm].total.kl_sum == pytest.approx(own.total.kl_sum)
    assert sum(told) == len(SHORT)
    assert parted.most_held <= max(rows, 4)
    assert len(whole.opened) == 2
    assert len(parted.opened) == 2 * len(told)


def test_pieces_of_an_answer_are_compared_with_its_own_tokens():
    sequence = ([1] * 130, [2, 3, 4, 5, 6, 7, 8])
    fake = Fake()
    logits = {}
    for arm in ("bf16", "fp8"):
        with fake(arm):
            logits[arm] = torch.cat([piece for _, piece in fake.teacher_forced([sequence])])

    found = compare_arms(fake, ("fp8",), [sequence], rows=1)["fp8"].total

    expected = measure_agreement(logits["fp8"], logits["bf16"], torch.tensor(sequence[1]))
    assert found.nll_sum == pytest.approx(expected.nll_sum)
    assert found.kl_sum == pytest.approx(expected.kl_sum)
    assert found.num_tokens == 7


def test_the_baseline_runs_even_if_nobody_asks_for_it():
    fake = Fake()
    found = compare_arms(fake, ("fp8",), SHORT[:1], rows=1)
    assert [arm for arm, _ in fake.opened] == ["bf16", "fp8"]
    assert list(found) == ["fp8"]


def test_the_cache_holds_the_longest_sequence_and_few_pages_else():
    fake = Fake()
    compare_arms(fake, ("bf16",), [([1] * 64, [2]), ([1] * 60, [2])], rows=10)
    compare_arms(fake, ("bf16",), [([1] * 40_000, [2])] * 2, rows=10)
    assert [pages for _, pages in fake.opened] == [3, 626]


def test_an_arm_that_breaks_is_closed(monkeypatch):
    class Broken(Fake):
        def teacher_forced(self, group):
            yield 0, torch.full((len(group[0][1]), 128), float("nan"))

        @contextlib.contextmanager
        def __call__(self, arm, num_pages=None):
            try:
                yield self
            finally:
                self.opened.append("closed")

    broken = Broken()
    with pytest.raises(EvaluationError, match="not finite"):
        compare_arms(broken, ("bf16", "fp8"), SHORT[:1], rows=1)
    assert broken.opened == ["closed"]


def test_the_rows_of_a_group_follow_from_the_vocabulary(minimax, monkeypatch):
    loaded = LoadedModel(minimax.model, minimax.tokenizer)
    assert answer_rows(loaded) == agreement_eval.LOGITS_BYTES // (4 * loaded.vocab_size)
    monkeypatch.setattr(agreement_eval, "LOGITS_BYTES", 1)
    assert answer_rows(loaded) == 1


def silent(_task, _count, _total):
    pass


class Tokenizer:
    """One token per character, and a special one in front if so wished."""

    def __init__(self, start=()):
        self.start = list(start)
        self.all_special_ids = [999]

    def __call__(self, text, **_options):
        return {"input_ids": [*self.start, *map(ord, text)]}


def test_windows_have_nothing_in_common_and_leave_nothing_out():
    windows = separate_windows(Tokenizer(), "abcdefgh", 3)
    assert ["".join(map(chr, window)) for window in windows] == ["abc", "def", "gh"]


def test_a_window_of_one_token_is_dropped():
    windows = separate_windows(Tokenizer(), "abcdefg", 3)
    assert ["".join(map(chr, window)) for window in windows] == ["abc", "def"]


def test_every_window_begins_with_the_special_token_that_texts_begin_with():
    windows = separate_windows(Tokenizer([999]), "abcdefg", 4)
    assert [window[0] for window in windows] == [999] * 3
    assert "".join(chr(one) for window in windows for one in window[1:]) == "abcdefg"


@pytest.mark.parametrize(
    ("text", "context", "start", "kind", "message"),
    [
        ("a", 8, (), DataError, r"fewer than two tokens \(1\), and a comparison needs two"),
        ("", 8, (), DataError, r"fewer than two tokens \(0\)"),
        ("abc", 1, (), EvaluationError, "the context is 1 tokens: give at least 2"),
        ("abc", 2, (999,), EvaluationError, "the context is 2 tokens: give at least 3"),
    ],
)
def test_a_text_or_window_that_is_too_short_is_refused(text, context, start, kind, message):
    with pytest.raises(kind, match=message):
        separate_windows(Tokenizer(start), text, context)


def test_the_section_says_what_was_compared(minimax):
    told = []
    loaded = LoadedModel(minimax.model, Tokenizer())
    measurement = AgreementMeasurement(
        AgreementSettings("text.txt", "ab" * 100, 80),
        loaded,
        lambda *progress: told.append(progress),
    )
    measurement.compare(Fake(), ("bf16", "fp8"))
    section = measurement.result()
    assert (section.data, section.context, section.num_windows) == ("text.txt", 80, 3)
    assert section.arms["fp8"].total.num_tokens == 79 + 79 + 39
    assert section.arms["bf16"].total.kl == 0 < section.arms["fp8"].total.kl
    assert [bucket.first for bucket in section.arms["fp8"].buckets] == [0]
    assert sum(count for _, count, _ in told) == told[0][2] == 3
    other = AgreementMeasurement(AgreementSettings("text.txt", "ab" * 100, 81), loaded, silent)
    other.compare(Fake(), ("bf16",))
    assert other.result().protocol_digest != section.protocol_digest


def test_texts_are_read_in_windows_that_the_model_can_hold(minimax):
    loaded = LoadedModel(minimax.model, Tokenizer())
    settings = AgreementSettings("text.txt", "a" * 5000)
    measurement = AgreementMeasurement(settings, loaded, silent)
    measurement.compare(Fake(), ("bf16",))
    assert measurement.result().context == 2048
