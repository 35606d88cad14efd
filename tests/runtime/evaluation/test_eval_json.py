"""Dataclasses from their JSON form, strictly."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.eval_json import decode


@dataclass(frozen=True)
class Leaf:
    number: float
    is_right: bool


@dataclass(frozen=True)
class Tree:
    name: str
    count: int
    leaves: tuple[Leaf, ...]
    by_name: Mapping[str, Mapping[str, Leaf]]
    maybe: Leaf | None
    numbers: tuple[float, ...] | None


TREE = Tree(
    "a", 3, (Leaf(0.5, True), Leaf(1.0, False)), {"x": {"y": Leaf(2.0, True)}}, None, (1.0,)
)


def changed(**changes):
    return {**dataclasses.asdict(TREE), **changes}


def test_what_went_through_json_is_equal():
    assert decode(Tree, json.loads(json.dumps(dataclasses.asdict(TREE))), "tree") == TREE


def test_a_tuple_may_be_a_tuple_still():
    assert decode(Tree, dataclasses.asdict(TREE), "tree") == TREE


def test_a_whole_number_may_stand_where_a_float_does():
    assert decode(Tree, changed(numbers=[1]), "tree") == TREE


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"tree must be a JSON object, not \[\]"),
        ({}, "tree lacks 'name'; the report is incomplete"),
        (changed(more=1), "tree has an unknown key 'more'; known: name, count"),
        (changed(name=None), "tree.name must be str, not None"),
        (changed(count=3.0), "tree.count must be int, not 3.0"),
        (changed(count=True), "tree.count must be int, not True"),
        (changed(leaves={}), r"tree.leaves must be a JSON array, not \{\}"),
        (changed(leaves="ab"), "tree.leaves must be a JSON array, not 'ab'"),
        (
            changed(leaves=[{"number": 1.0, "is_right": 1}]),
            r"tree.leaves\[0\].is_right must be bool",
        ),
        (changed(by_name={"x": []}), r"tree.by_name.x must be a JSON object"),
        (changed(by_name={"x": {"y": {}}}), "tree.by_name.x.y lacks 'number'"),
        (changed(maybe=3), "tree.maybe must be a JSON object, not 3"),
        (changed(numbers=["1"]), r"tree.numbers\[0\] must be float, not '1'"),
    ],
)
def test_what_is_malformed_is_named(value, message):
    with pytest.raises(EvaluationError, match=message):
        decode(Tree, value, "tree")
