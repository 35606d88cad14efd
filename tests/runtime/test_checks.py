"""Settings of the wrong type or out of bounds."""

import pytest

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.checks import check_choice, check_integer, check_switch


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 9])
def test_what_is_no_whole_number_in_bounds_is_refused(value):
    with pytest.raises(
        RequestError, match=r"size is .*: give a whole number of at least 1 and at most 8"
    ):
        check_integer("size", value, least=1, most=8)


def test_what_is_right_passes():
    check_integer("size", 8, least=1, most=8)
    check_integer("size", -(10**30))
    check_switch("switch", False)
    check_choice("mode", "a", ("a", "b"))


@pytest.mark.parametrize("value", [1, None, "True"])
def test_a_switch_is_on_or_off(value):
    with pytest.raises(RequestError, match=r"switch is .*: give True or False"):
        check_switch("switch", value)


def test_a_choice_is_one_of_several():
    with pytest.raises(RequestError, match=r"mode is 'c': give one of a, b"):
        check_choice("mode", "c", ("a", "b"))
