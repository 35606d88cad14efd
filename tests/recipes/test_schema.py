"""What a recipe says, and the checks of its values."""

import dataclasses
import math

import pytest

from fp8kv.recipes import (
    Calibration,
    Data,
    Expect,
    Model,
    Output,
    Recipe,
    RecipeError,
    Scales,
    Source,
)


def test_a_recipe_needs_no_more_than_a_name():
    recipe = Recipe(name="mine")
    assert recipe.data.num_samples == 512
    assert recipe.scales.estimator == "absmax"
    assert recipe.output.targets == ("vllm", "sglang")
    assert recipe.model == Model()
    assert recipe.expect == Expect()
    assert recipe.measured == {}


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe(name="mine").name = "yours"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe(name=" "), "name is empty; expected the name of the recipe"),
        (lambda: Data(sources=()), "data.sources is empty; expected at least one dataset"),
        (
            lambda: Data(sources=(Source("a"), Source(""))),
            "data.sources[1].dataset is empty; expected a dataset name or path",
        ),
        (
            lambda: Data(sources=(Source("a", split=""),)),
            "data.sources[0].split is empty; expected the name of a split",
        ),
        (
            lambda: Data(sources=(Source("a", weight=0.0),)),
            "data.sources[0].weight is 0.0; expected a number above 0",
        ),
        (
            lambda: Data(num_samples=0),
            "data.num_samples is 0; expected a whole number of at least 1",
        ),
        (lambda: Data(seq_len=-1), "data.seq_len is -1; expected a whole number of at least 1"),
        (lambda: Data(seed=-1), "data.seed is -1; expected a whole number of at least 0"),
        (
            lambda: Calibration(batch_size=0),
            "calibration.batch_size is 0; expected a whole number of at least 1",
        ),
        (
            lambda: Scales(percentile=0.0),
            "scales.percentile is 0.0; expected a number above 0 and at most 100",
        ),
        (
            lambda: Scales(percentile=100.1),
            "scales.percentile is 100.1; expected a number above 0 and at most 100",
        ),
        (lambda: Scales(headroom=0.0), "scales.headroom is 0.0; expected a number above 0"),
        (lambda: Scales(headroom=math.nan), "scales.headroom is nan; expected a number above 0"),
        (lambda: Scales(headroom=math.inf), "scales.headroom is inf; expected a number above 0"),
        (lambda: Output(targets=()), "output.targets is empty; expected at least one engine"),
        (
            lambda: Output(targets=("vllm", "vllm")),
            "output.targets is [vllm, vllm]; expected each engine once",
        ),
        (
            lambda: Expect(max_kl=-0.1),
            "expect.max_kl is -0.1; expected a number of at least 0",
        ),
        (
            lambda: Expect(max_accuracy_drop=math.nan),
            "expect.max_accuracy_drop is nan; expected a number of at least 0",
        ),
        (
            lambda: Expect(min_top1=1.1),
            "expect.min_top1 is 1.1; expected a number from 0 to 1",
        ),
        (
            lambda: Expect(min_needle_recall=-1.0),
            "expect.min_needle_recall is -1.0; expected a number from 0 to 1",
        ),
        (
            lambda: Expect(max_perplexity_ratio=0.0),
            "expect.max_perplexity_ratio is 0.0; expected a number above 0",
        ),
        (
            lambda: Model(facts={"head_dim": None}),
            "model.facts.head_dim is None; expected a number, text, true or false, "
            "or a list of accepted ones",
        ),
        (lambda: Model(facts={"head_dim": []}), "model.facts.head_dim is []; expected a number"),
        (
            lambda: Recipe(
                name="x", model=Model(attention="mla"), scales=Scales(granularity="head")
            ),
            'scales.granularity is "head" while model.attention is "mla"',
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(build, message):
    with pytest.raises(RecipeError) as caught:
        build()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Scales(percentile=100.0),
        lambda: Scales(headroom=0.5),
        lambda: Data(num_samples=1, seq_len=1, seed=0),
        lambda: Expect(max_kl=0.0, max_accuracy_drop=0.0, min_top1=1.0, min_needle_recall=0.0),
        lambda: Recipe(name="x", model=Model(attention="gqa"), scales=Scales(granularity="head")),
        lambda: Recipe(name="x", scales=Scales(granularity="head")),
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(build):
    build()
