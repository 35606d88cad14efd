"""Digests of what was read: the same for the same numbers and for no others."""

from fp8kv.runtime.evaluation.digests import json_digest


def test_a_digest_is_that_of_the_json_text():
    assert json_digest([[1, 2], "ä"]) == json_digest(((1, 2), "ä"))
    # printf '[1, 2]' | sha256sum
    assert json_digest([1, 2]) == "3a316d6d3226f84c1e46e4447fa8d5fd800bff4a1bc6498152523cd4a602b69b"


def test_other_numbers_other_cuts_and_other_kinds_differ():
    contents = [[1, 2, 3], [[1, 2], [3]], [[1], [2, 3]], [1, 2, "3"], [3, 2, 1]]
    assert len({json_digest(content) for content in contents}) == len(contents)
