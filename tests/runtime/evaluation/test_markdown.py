"""Tables, code spans and numbers in Markdown."""

import pytest

from fp8kv.runtime.evaluation.markdown import code, p_value, points, small, table


def test_a_table_aligns_numbers_to_the_right():
    assert table(("name", "count"), 1, [["a", "1"], ["b", "22"]]) == [
        "| name | count |",
        "| --- | ---: |",
        "| a | 1 |",
        "| b | 22 |",
    ]


def test_nothing_leaves_a_code_span():
    assert code("a`b\n# c") == "`a'b # c`"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.004, "+0.40"), (-0.066, "-6.60"), (0.0, "0.00"), (1e-6, "0.00"), (-1e-6, "0.00")],
)
def test_a_difference_has_its_sign_unless_it_rounds_to_nothing(share, text):
    assert points(share) == text


def test_small_numbers_have_two_digits():
    assert [small(value) for value in (0.0, 1.04e-5, 0.119, 7.25)] == ["0", "1e-05", "0.12", "7.2"]


def test_p_values_below_a_thousandth_are_given_as_powers():
    assert [p_value(value) for value in (1.0, 0.0123, 3.62e-8)] == ["1.000", "0.012", "3.6e-08"]
