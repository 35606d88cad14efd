"""How fast a counter grew of late."""

import pytest

pytest.importorskip("fastapi")

from fp8kv.runtime.server.rate import Rate


def test_nothing_grew_before_the_first_note():
    assert Rate().per_second(5.0) == 0


def test_the_mean_is_that_of_the_last_seconds():
    rate = Rate()
    for second in range(100):
        rate.note(float(second), second * 30 if second < 50 else 1500 + (second - 50) * 10)
    assert rate.per_second(99.0) == pytest.approx(10)


def test_what_stands_still_slows_down_to_nothing():
    rate = Rate()
    for step in range(21):
        rate.note(step / 2, step * 5)
    assert rate.per_second(10.0) == pytest.approx(10)
    assert 0 < rate.per_second(15.0) < 10
    assert rate.per_second(40.0) == 0


def test_a_young_counter_is_not_overrated():
    rate = Rate()
    rate.note(100.0, 50)
    assert rate.per_second(100.0) == pytest.approx(5)


def test_notes_in_quick_succession_take_no_memory():
    rate = Rate()
    for step in range(100_000):
        rate.note(step / 1000, step)
    assert len(rate._samples) < 50
    assert rate.per_second(100.0) == pytest.approx(1000, rel=0.05)
