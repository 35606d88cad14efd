"""Paired statistics: McNemar's exact test and the bootstrap, against independent references."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation import paired
from fp8kv.runtime.evaluation.paired import (
    Accuracy,
    PairedComparison,
    bootstrap_interval,
    compare,
    mcnemar_p_value,
    wilson_interval,
)

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def enumerated_p_value(only_a: int, only_b: int) -> float:
    """The share of all assignments of discordant pairs that are as uneven, by enumeration."""
    num_pairs = only_a + only_b
    observed = abs(only_a - only_b)
    sums = (abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=num_pairs))
    return sum(total >= observed for total in sums) / 2**num_pairs


class TestMcnemar:
    @pytest.mark.parametrize(
        ("only_a", "only_b", "p_value"),
        [
            (0, 0, 1.0),
            (1, 0, 1.0),
            (3, 3, 1.0),
            (5, 6, 1.0),
            (0, 6, 0.03125),
            (2, 8, 0.109375),
            (8, 0, 0.0078125),
            (10, 2, 158 / 4096),
            (5, 25, 2 * 174437 / 2**30),
            # Approval ratings of a prime minister in Agresti, Categorical Data Analysis, 10.1.
            (86, 150, 3.716e-05),
        ],
    )
    def test_gives_the_tabulated_value(self, only_a: int, only_b: int, p_value: float) -> None:
        assert mcnemar_p_value(only_a, only_b) == pytest.approx(p_value, rel=1e-4)

    def test_agrees_with_enumeration_of_every_assignment(self) -> None:
        for only_a, only_b in itertools.product(range(7), repeat=2):
            expected = enumerated_p_value(only_a, only_b)
            assert mcnemar_p_value(only_a, only_b) == pytest.approx(expected, rel=1e-15)

    @given(st.integers(0, 400), st.integers(0, 400))
    def test_is_symmetric_and_a_positive_probability(self, only_a: int, only_b: int) -> None:
        p_value = mcnemar_p_value(only_a, only_b)
        assert p_value == mcnemar_p_value(only_b, only_a)
        assert 0 < p_value <= 1

    @given(st.integers(0, 100), st.integers(0, 100))
    def test_falls_as_the_counts_grow_uneven(self, smaller: int, excess: int) -> None:
        larger = smaller + excess
        assert mcnemar_p_value(smaller, larger + 1) <= mcnemar_p_value(smaller, larger)

    def test_stays_positive_below_the_smallest_float(self) -> None:
        assert mcnemar_p_value(0, 1074) == math.ulp(0.0) * 2
        assert mcnemar_p_value(0, 5000) == math.ulp(0.0)

    def test_refuses_negative_counts(self) -> None:
        with pytest.raises(EvaluationError, match="cannot be negative: -1 and 4"):
            mcnemar_p_value(-1, 4)


class TestBootstrap:
    def test_quantiles_are_those_of_every_resample_of_a_small_sample(self) -> None:
        values = (1.0, 0.5, 0.0, -1.0, 0.25)
        means = np.sort([np.mean(c) for c in itertools.product(values, repeat=len(values))])
        low, high = bootstrap_interval(values)
        # The shares of all 3,125 resamples below each end; 10,000 draws know them to about 0.005.
        assert np.mean(means < low) - 0.005 <= 0.025 <= np.mean(means <= low) + 0.005
        assert np.mean(means > high) - 0.005 <= 0.025 <= np.mean(means >= high) + 0.005

    def test_approaches_the_normal_interval_for_many_problems(self) -> None:
        values = np.random.default_rng(0).normal(0.1, 2.0, size=2000)
        low, high = bootstrap_interval(values)
        half_width = 1.96 * values.std() / math.sqrt(len(values))
        assert low == pytest.approx(values.mean() - half_width, abs=0.05 * half_width)
        assert high == pytest.approx(values.mean() + half_width, abs=0.05 * half_width)

    def test_has_no_width_where_all_problems_agree(self) -> None:
        assert bootstrap_interval([0.0] * 64) == (0.0, 0.0)
        assert bootstrap_interval([-1]) == (-1.0, -1.0)

    def test_is_repeatable_and_depends_on_the_seed(self) -> None:
        values = np.random.default_rng(1).normal(size=50)
        assert bootstrap_interval(values) == bootstrap_interval(values)
        assert bootstrap_interval(values) != bootstrap_interval(values, seed=2)

    def test_does_not_depend_on_how_much_is_drawn_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = np.random.default_rng(1).normal(size=37)
        at_once = bootstrap_interval(values, num_resamples=500)
        for draws in (1, 370, 1000):
            monkeypatch.setattr(paired, "_MAX_DRAWS", draws)
            assert bootstrap_interval(values, num_resamples=500) == at_once

    def test_widens_with_the_confidence(self) -> None:
        values = np.random.default_rng(1).normal(size=50)
        narrow = bootstrap_interval(values, confidence=0.5)
        wide = bootstrap_interval(values, confidence=0.99)
        assert wide[0] < narrow[0] < narrow[1] < wide[1]

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            ([], {}, "at least one"),
            ([[1.0]], {}, "one difference per problem"),
            ([0.0, math.nan], {}, "difference of problem 1"),
            ([1.0], {"num_resamples": 0}, "number of resamples is 0"),
            ([1.0], {"confidence": 1.0}, "confidence is 1.0"),
            ([1.0], {"confidence": math.nan}, "confidence is nan"),
        ],
    )
    def test_refuses_what_has_no_interval(self, values, options, message: str) -> None:
        with pytest.raises(EvaluationError, match=message):
            bootstrap_interval(values, **options)


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [
            # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
            (5, 10, 0.2366, 0.7634),
        ],
    )
    def test_gives_the_published_interval(
        self, successes: int, trials: int, low: float, high: float
    ) -> None:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)

    @given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_holds_the_proportion_lies_in_the_unit_interval_and_mirrors(
        self, counts: tuple[int, int]
    ) -> None:
        successes, trials = counts
        low, high = wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1
        assert low < high
        mirrored = wilson_interval(trials - successes, trials)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)

    def test_ends_solve_the_score_equation(self) -> None:
        successes, trials, z = 37, 64, 1.959963984540054
        for end in wilson_interval(successes, trials):
            standard_error = math.sqrt(end * (1 - end) / trials)
            assert abs(successes / trials - end) == pytest.approx(z * standard_error, rel=1e-12)

    @pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
    def test_refuses_what_is_no_proportion(self, successes: int, trials: int) -> None:
        with pytest.raises(EvaluationError, match=f"{successes} right of {trials}"):
            wilson_interval(successes, trials)


class TestCompare:
    def test_counts_every_kind_of_pair(self) -> None:
        a = [True] * 5 + [True] * 3 + [False] * 1 + [False] * 2
        b = [True] * 5 + [False] * 3 + [True] * 1 + [False] * 2
        result = compare(a, b)
        assert (result.n, result.both_right, result.neither) == (11, 5, 2)
        assert (result.only_a, result.only_b) == (3, 1)
        assert result.difference == 2 / 11
        assert result.p_value == mcnemar_p_value(3, 1) == 0.625

    def test_of_an_arm_with_itself_finds_no_difference(self) -> None:
        arm = [True, False, True]
        assert compare(arm, arm) == PairedComparison(
            n=3, both_right=2, only_a=0, only_b=0, neither=1,
            difference=0.0, ci_low=0.0, ci_high=0.0, p_value=1.0,
        )  # fmt: skip

    @settings(max_examples=50)
    @given(outcomes)
    def test_holds_its_invariants_and_mirrors(self, pairs: list[tuple[bool, bool]]) -> None:
        a, b = [first for first, _ in pairs], [second for _, second in pairs]
        result, mirrored = compare(a, b), compare(b, a)
        assert result.both_right + result.only_a + result.only_b + result.neither == result.n
        assert result.difference == pytest.approx(np.mean(a) - np.mean(b), abs=1e-15)
        assert result.ci_low <= result.difference <= result.ci_high
        assert -1 <= result.ci_low <= result.ci_high <= 1
        assert 0 < result.p_value <= 1
        assert (mirrored.only_a, mirrored.only_b) == (result.only_b, result.only_a)
        assert mirrored.difference == -result.difference
        assert mirrored.p_value == result.p_value
        ends = (mirrored.ci_low, mirrored.ci_high)
        assert ends == pytest.approx((-result.ci_high, -result.ci_low), abs=1e-12)

    def test_sees_what_two_separate_intervals_cannot(self) -> None:
        baseline = [True] * 490 + [False] * 10
        arm = [True] * 482 + [False] * 18
        result = compare(arm, baseline)
        assert wilson_interval(482, 500)[1] > wilson_interval(490, 500)[0]
        assert result.p_value < 0.01
        assert result.ci_high < 0

    def test_accepts_numpy_outcomes(self) -> None:
        arm = np.array([True, False, True])
        assert compare(arm, ~arm) == compare([True, False, True], [False, True, False])

    def test_refuses_unequal_lengths_and_no_problems(self) -> None:
        with pytest.raises(EvaluationError, match="the arms answered 2 and 1 problems"):
            compare([True, False], [True])
        with pytest.raises(EvaluationError, match="no problem was evaluated"):
            compare([], [])


class TestAccuracy:
    def test_counts_and_gives_the_wilson_interval(self) -> None:
        accuracy = Accuracy.from_outcomes([True] * 5 + [False] * 5)
        assert (accuracy.right, accuracy.n, accuracy.value) == (5, 10, 0.5)
        assert (accuracy.ci_low, accuracy.ci_high) == pytest.approx((0.2366, 0.7634), abs=5e-5)

    def test_refuses_no_outcomes(self) -> None:
        with pytest.raises(EvaluationError, match="nothing was asked"):
            Accuracy.from_outcomes([])
