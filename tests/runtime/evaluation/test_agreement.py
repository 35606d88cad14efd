"""Teacher-forced agreement: NLL, top-1 and KL against direct computation."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation import agreement
from fp8kv.runtime.evaluation.agreement import Agreement, measure_agreement, token_kl, token_nll


def make_logits(seed: int, tokens: int, vocabulary: int, spread: float = 5.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, vocabulary, generator=generator) * spread


def reference_tokens(seed: int, tokens: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (tokens,), generator=generator)


class TestClosedForms:
    def test_uniform_logits_have_the_log_of_the_vocabulary_as_nll(self) -> None:
        flat = torch.full((3, 50), 7.0)
        result = measure_agreement(flat, flat, torch.tensor([0, 9, 49]))
        assert result.nll_sum == pytest.approx(3 * math.log(50), rel=1e-14)
        assert result.kl_sum == 0.0

    def test_two_tokens_with_known_probabilities(self) -> None:
        baseline = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
        arm = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
        result = measure_agreement(arm, baseline, torch.tensor([1]))
        assert result.nll_sum == pytest.approx(math.log(2), rel=1e-14)
        expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        assert result.kl_sum == pytest.approx(expected, rel=1e-14)
        assert result.kl_max == result.kl_sum

    def test_kl_is_from_the_baseline_to_the_arm(self) -> None:
        peaked = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
        flat = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
        token = torch.tensor([0])
        forward = measure_agreement(flat, peaked, token).kl_sum
        backward = measure_agreement(peaked, flat, token).kl_sum
        assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-14)
        assert backward == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-14)

    def test_small_gaussian_disturbance_gives_half_its_variance(self) -> None:
        # KL of softmax(x) and softmax(x + e) is Var_p(e) / 2 to second order.
        baseline = make_logits(0, 1, 1000, 1.0).double()
        disturbance = 1e-4 * make_logits(1, 1, 1000, 1.0).double()
        p = baseline.softmax(-1)
        variance = (p * disturbance**2).sum() - (p * disturbance).sum() ** 2
        result = measure_agreement(baseline + disturbance, baseline, torch.tensor([5]))
        assert result.kl_sum == pytest.approx(float(variance) / 2, rel=1e-3)

    def test_counts_top1_against_the_reference_and_against_the_baseline(self) -> None:
        baseline = torch.eye(4)[[0, 1, 2, 3]]
        arm = torch.eye(4)[[0, 1, 3, 0]]
        result = measure_agreement(arm, baseline, torch.tensor([0, 2, 3, 1]))
        assert (result.top1_match_reference, result.top1_match_baseline) == (2, 2)
        result = measure_agreement(arm, baseline, torch.tensor([1, 0, 0, 2]))
        assert (result.top1_match_reference, result.top1_match_baseline) == (0, 2)

    def test_of_the_baseline_with_itself_is_perfect(self) -> None:
        logits = make_logits(0, 20, 300).to(torch.bfloat16)
        result = measure_agreement(logits, logits, reference_tokens(0, 20, 300))
        assert (result.kl_sum, result.kl_max) == (0.0, 0.0)
        assert result.top1_match_baseline == result.num_tokens == 20


class TestNumerics:
    def test_resolves_a_divergence_far_below_float32_rounding(self) -> None:
        baseline = make_logits(0, 8, 4096, 2.5)
        arm = baseline + 1e-4 * make_logits(1, 8, 4096, 1.0)
        p, q = (torch.log_softmax(x.double(), -1) for x in (baseline, arm))
        exact = float((p.exp() * (p - q)).sum())
        p32, q32 = torch.log_softmax(baseline, -1), torch.log_softmax(arm, -1)
        in_float32 = float((p32.exp() * (p32 - q32)).sum())
        assert exact < 1e-7
        assert abs(in_float32 - exact) > 0.1 * exact
        result = measure_agreement(arm, baseline, torch.zeros(8, dtype=torch.int64))
        assert result.kl_sum == pytest.approx(exact, rel=1e-6)

    @settings(max_examples=50, deadline=None)
    @given(
        st.integers(0, 2**31),
        st.integers(1, 9),
        st.integers(1, 40),
        st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 1.0, 100.0]),
        st.floats(-1000, 1000),
    )
    def test_kl_is_never_negative_and_ignores_a_shift(
        self, seed: int, tokens: int, vocabulary: int, disturbance: float, shift: float
    ) -> None:
        baseline = make_logits(seed, tokens, vocabulary, 10.0).double()
        arm = baseline + disturbance * make_logits(seed + 1, tokens, vocabulary).double()
        targets = reference_tokens(seed, tokens, vocabulary)
        result = measure_agreement(arm, baseline, targets)
        assert 0 <= result.kl_max <= result.kl_sum
        assert result.nll_sum >= 0
        shifted = measure_agreement(arm + shift, baseline, targets)
        assert shifted.kl_sum == pytest.approx(result.kl_sum, rel=1e-9, abs=1e-10)

    def test_rounding_below_zero_is_clamped(self) -> None:
        # Log probabilities whose terms sum to a little less than zero.
        baseline = torch.log_softmax(make_logits(3, 200, 500).double(), -1)
        arm = torch.log_softmax(make_logits(3, 200, 500).double() + 1 / 3, -1)
        raw = (baseline.exp() * (baseline - arm)).sum(-1)
        assert float(raw.min()) < 0
        assert float(token_kl(baseline, arm).min()) == 0

    def test_masked_vocabulary_entries_add_nothing(self) -> None:
        baseline, arm = make_logits(0, 4, 10), make_logits(1, 4, 10)
        masked = torch.full((4, 3), -math.inf)
        targets = reference_tokens(0, 4, 10)
        padded = measure_agreement(
            torch.cat([arm, masked], -1), torch.cat([baseline, masked], -1), targets
        )
        plain = measure_agreement(arm, baseline, targets)
        assert padded.kl_sum == pytest.approx(plain.kl_sum, rel=1e-14)
        assert padded.nll_sum == pytest.approx(plain.nll_sum, rel=1e-14)

    def test_huge_logits_do_not_overflow(self) -> None:
        baseline, arm = torch.tensor([[0.0, 3e38]]), torch.tensor([[0.0, 1e30]])
        result = measure_agreement(arm, baseline, torch.tensor([1]))
        assert (result.nll_sum, result.kl_sum) == (0.0, 0.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_takes_logits_of_any_floating_type(self, dtype: torch.dtype) -> None:
        baseline, arm = make_logits(0, 6, 50).to(dtype), make_logits(1, 6, 50).to(dtype)
        targets = reference_tokens(0, 6, 50)
        expected = measure_agreement(arm.double(), baseline.double(), targets)
        assert measure_agreement(arm, baseline, targets.int()) == expected

    def test_token_functions_have_one_value_per_token(self) -> None:
        log_probabilities = torch.log_softmax(make_logits(0, 6, 50), -1)
        targets = reference_tokens(0, 6, 50)
        nll = token_nll(log_probabilities, targets)
        assert nll.tolist() == [-log_probabilities[i, t].item() for i, t in enumerate(targets)]
        assert token_kl(log_probabilities, log_probabilities).tolist() == [0.0] * 6


class TestMerge:
    def parts(self) -> list[Agreement]:
        targets = reference_tokens(0, 23, 60)
        arm, baseline = make_logits(0, 23, 60), make_logits(1, 23, 60)
        bounds = [0, 1, 1, 9, 23]
        slices = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        return [measure_agreement(arm[s], baseline[s], targets[s]) for s in slices]

    def whole(self) -> Agreement:
        return measure_agreement(
            make_logits(0, 23, 60), make_logits(1, 23, 60), reference_tokens(0, 23, 60)
        )

    def assert_equal(self, found: Agreement, expected: Agreement) -> None:
        assert found.num_tokens == expected.num_tokens
        assert found.top1_match_reference == expected.top1_match_reference
        assert found.top1_match_baseline == expected.top1_match_baseline
        assert found.kl_max == pytest.approx(expected.kl_max, rel=1e-13)
        assert found.kl_sum == pytest.approx(expected.kl_sum, rel=1e-13)
        assert found.nll_sum == pytest.approx(expected.nll_sum, rel=1e-13)

    def test_of_any_split_in_any_order_gives_the_whole(self) -> None:
        for seed in range(5):
            parts = self.parts()
            random.Random(seed).shuffle(parts)
            merged = Agreement()
            for part in parts:
                merged = merged.merge(part)
            self.assert_equal(merged, self.whole())

    def test_with_nothing_changes_nothing(self) -> None:
        part = self.parts()[2]
        assert part.merge(Agreement()) == part == Agreement().merge(part)

    @pytest.mark.parametrize("rows", [1, 2, 7, 22, 23, 24])
    def test_chunking_changes_nothing(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = self.whole()
        monkeypatch.setattr(agreement, "_CHUNK_ELEMENTS", rows * 60)
        self.assert_equal(self.whole(), expected)

    def test_a_vocabulary_larger_than_a_chunk_is_taken_row_by_row(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = self.whole()
        monkeypatch.setattr(agreement, "_CHUNK_ELEMENTS", 1)
        self.assert_equal(self.whole(), expected)


class TestSummary:
    def test_divides_by_the_tokens(self) -> None:
        total = Agreement(
            num_tokens=8,
            nll_sum=2.0,
            top1_match_reference=7,
            top1_match_baseline=6,
            kl_sum=0.5,
            kl_max=0.25,
        )
        summary = total.summary()
        assert (summary.num_tokens, summary.nll, summary.kl) == (8, 0.25, 0.0625)
        assert (summary.top1_reference, summary.top1_baseline) == (0.875, 0.75)
        assert summary.kl_max == 0.25

    def test_of_nothing_is_refused(self) -> None:
        empty = measure_agreement(
            torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
        )
        assert empty == Agreement()
        with pytest.raises(EvaluationError, match="no reference token was compared"):
            empty.summary()


class TestRefusals:
    ROWS = torch.zeros(2, 5)
    TOKENS = torch.tensor([0, 4])

    @pytest.mark.parametrize(
        ("logits", "baseline", "tokens", "message"),
        [
            (ROWS[0], ROWS[0], TOKENS, r"shape \[5\].*both must be \[tokens, vocabulary\]"),
            (ROWS, ROWS[:, :4], TOKENS, r"shape \[2, 5\] and baseline logits of shape \[2, 4\]"),
            (torch.zeros(2, 0), torch.zeros(2, 0), TOKENS, r"\[tokens, vocabulary\]"),
            (ROWS, ROWS.long(), TOKENS, "floating, not torch.float32 and torch.int64"),
            (ROWS, ROWS, TOKENS[:1], r"\[1\] reference tokens for 2 rows"),
            (ROWS, ROWS, TOKENS.float(), "must be integers, not torch.float32"),
            (ROWS, ROWS, TOKENS > 0, "must be integers, not torch.bool"),
            (ROWS, ROWS, torch.tensor([0, 5]), "from 0 to 5, outside the model's vocabulary of 5"),
            (ROWS, ROWS, torch.tensor([-1, 4]), "from -1 to 4, outside"),
        ],
    )
    def test_name_what_does_not_fit(self, logits, baseline, tokens, message: str) -> None:
        with pytest.raises(EvaluationError, match=message):
            measure_agreement(logits, baseline, tokens)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("which", ["arm", "baseline"])
    def test_name_the_tokens_whose_logits_are_not_finite(
        self, value: float, which: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(agreement, "_CHUNK_ELEMENTS", 20)
        good, bad = torch.zeros(10, 5), torch.zeros(10, 5)
        bad[6, 3] = value
        arm, baseline = (bad, good) if which == "arm" else (good, bad)
        with pytest.raises(EvaluationError, match="reference tokens 4 to 7 is not finite"):
            measure_agreement(arm, baseline, torch.zeros(10, dtype=torch.int64))

    def test_name_an_arm_that_excludes_what_the_baseline_allows(self) -> None:
        arm = torch.tensor([[0.0, -math.inf]])
        with pytest.raises(EvaluationError, match="not finite"):
            measure_agreement(arm, torch.zeros(1, 2), torch.tensor([0]))
