"""Sampling: what is drawn, how often, and that the rest of the batch has no part in it."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime import sampling
from fp8kv.runtime.sampling import MAX_LOGPROBS, SamplingParameters, draw_weights

VOCAB = 12
ONE = 1 << 40

# halves, so that equal logits are common
logit_rows = st.lists(
    st.integers(-20, 20).map(lambda half: half / 2), min_size=VOCAB, max_size=VOCAB
)
parameters = st.builds(
    SamplingParameters,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, VOCAB + 2),
    top_p=st.just(1.0) | st.floats(0.01, 1.0),
    seed=st.integers(-(2**70), 2**70),
    logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
)
cases = st.tuples(logit_rows, parameters, st.integers(0, 1000))


def sample(logits, own, steps):
    return sampling.sample(logits, own, steps).read()


def drawing(**options):
    return SamplingParameters(**{"max_tokens": 1, "temperature": 1.0, "seed": 7, **options})


def draw_many(row, own, count):
    logits = torch.tensor(row).expand(count, -1)
    return sample(logits, [own] * count, range(count)).token_ids


def plain_weights(row, own):
    """Return the weights, in plain Python, and how far top-p is from deciding otherwise for a token."""
    weights = [math.exp((logit - max(row)) / own.temperature) for logit in row]
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))[: own.top_k]
    total = sum(weights[token] for token in order)
    before, kept, margin = 0.0, [0.0] * len(row), math.inf
    for token in order:
        if before < own.top_p * total:
            kept[token] = weights[token]
        if own.top_p < 1:
            margin = min(margin, abs(before / total - own.top_p))
        before += weights[token]
    return kept, margin


@given(st.lists(cases, min_size=1, max_size=6), st.data())
@settings(deadline=None)
def test_a_sequence_gets_the_same_in_any_batch(batch, data):
    alone = [sample(torch.tensor([row]), [own], [step]) for row, own, step in batch]
    order = data.draw(st.permutations(range(len(batch))))
    rows, own, steps = zip(*(batch[index] for index in order), strict=True)

    together = sample(torch.tensor(rows), own, steps)

    for place, index in enumerate(order):
        assert together.token_ids[place] == alone[index].token_ids[0]
        if own[place].logprobs is None:
            assert together.logprobs[place] is None
        else:
            assert together.logprobs[place] == pytest.approx(alone[index].logprobs[0], abs=1e-5)
        assert [token for token, _ in together.top[place]] == [
            token for token, _ in alone[index].top[0]
        ]


@given(st.lists(logit_rows, min_size=1, max_size=4))
@settings(deadline=None)
def test_greedy_takes_the_likeliest_and_of_equals_the_first(rows):
    own = [SamplingParameters(1, top_k=3, top_p=0.5, seed=row) for row in range(len(rows))]

    sampled = sample(torch.tensor(rows), own, [0] * len(rows))

    assert sampled.token_ids == [row.index(max(row)) for row in rows]


@given(logit_rows, parameters)
@settings(deadline=None)
def test_weights_equal_the_plain_reference(row, own):
    assume(own.temperature > 0)
    expected, margin = plain_weights(row, own)
    assume(margin > 1e-9)

    found = draw_weights(torch.tensor([row]), [own])[0].tolist()

    assert found == pytest.approx([weight * ONE for weight in expected], rel=1e-12, abs=1)
    assert [weight > 0 for weight in found] == [int(weight * ONE) > 0 for weight in expected]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}]
)
def test_tokens_come_as_often_as_their_weights_say(options):
    row = [1.0, -0.5, 2.0, 0.25, 1.5, -3.0]
    own, count = drawing(**options), 20_000
    weights, _ = plain_weights(row, own)

    found = torch.tensor(draw_many(row, own, count)).bincount(minlength=len(row)) / count

    expected = torch.tensor(weights) / sum(weights)
    # four standard deviations
    assert (found - expected).abs().le(4 * (expected * (1 - expected) / count).sqrt()).all()


def test_seed_and_step_choose_the_draw():
    row = [0.0] * 50
    by_seed = [draw_many(row, drawing(seed=seed), 30) for seed in (1, 1, 2)]

    assert by_seed[0] == by_seed[1] != by_seed[2]
    assert len(set(by_seed[0])) > 10


def test_draws_without_a_seed_differ():
    assert draw_many([0.0] * 50, drawing(seed=None), 30) != draw_many(
        [0.0] * 50, drawing(seed=None), 30
    )


def test_draws_stay_as_they_are_from_release_to_release():
    row = [index / 10 for index in range(40)]

    assert draw_many(row, drawing(seed=0), 12) == [36, 39, 34, 32, 27, 37, 35, 23, 34, 28, 31, 38]


@pytest.mark.parametrize("options", [{"top_k": VOCAB}, {"top_k": 10**400}, {"top_p": 1}])
def test_a_filter_that_lets_all_pass_changes_nothing(options):
    row = torch.randn(VOCAB).tolist()

    assert draw_many(row, drawing(**options), 50) == draw_many(row, drawing(), 50)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 5e-324}])
def test_the_narrowest_draw_is_the_likeliest_token(options):
    row = torch.randn(VOCAB).tolist()

    assert set(draw_many(row, drawing(**options), 50)) == {row.index(max(row))}


def test_the_hottest_draw_takes_every_token():
    assert set(draw_many([100.0, 0.0, -100.0], drawing(temperature=1e300), 50)) == {0, 1, 2}


def test_excluded_tokens_are_never_drawn():
    row = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]

    assert set(draw_many(row, drawing(), 200)) == {1, 3}


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 3)])
def test_the_smallest_and_the_largest_random_number_draw_no_excluded_token(
    monkeypatch, uniform, token
):
    monkeypatch.setattr(sampling, "_uniform", lambda seed, step: uniform)

    assert draw_many([-math.inf, 0.0, -math.inf, 0.0, -math.inf], drawing(), 1) == [token]


def test_top_p_keeps_the_fewest_tokens_that_suffice():
    assert draw_weights(torch.zeros(1, 4), [drawing(top_p=0.5)]).tolist() == [[ONE, ONE, 0, 0]]


def test_logprobs_are_the_models_own_whatever_the_draw():
    logits = torch.randn(3, VOCAB)
    own = [drawing(temperature=0.1, top_k=2, logprobs=count) for count in (0, 5, MAX_LOGPROBS)]
    expected = logits.log_softmax(-1)

    sampled = sample(logits, own, [0, 1, 2])

    chosen = expected[range(3), sampled.token_ids]
    torch.testing.assert_close(torch.tensor(sampled.logprobs), chosen)
    assert [len(top) for top in sampled.top] == [0, 5, VOCAB]
    for row, top in enumerate(sampled.top[1:], start=1):
        values, ids = expected[row].sort(descending=True)
        assert [token for token, _ in top] == ids[: len(top)].tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in top]), values[: len(top)])


def test_logits_are_left_as_they_are_and_may_be_a_view():
    whole = torch.randn(4, 2 * VOCAB)
    before = whole.clone()
    view = whole[::2, ::2]
    own = [drawing(top_k=3, logprobs=2), SamplingParameters(1)]

    assert sample(view, own, [0, 0]) == sample(view.contiguous(), own, [0, 0])
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    "own",
    [SamplingParameters(1), drawing(), drawing(top_k=2, top_p=0.5), drawing(logprobs=2)],
)
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf] * VOCAB])
def test_logits_that_are_no_numbers_give_no_token_and_leave_the_others_alone(own, values):
    logits = torch.randn(3, VOCAB)
    expected = sample(logits, [own] * 3, [0] * 3)
    logits[1, : len(values)] = torch.tensor(values)

    found = sample(logits, [own] * 3, [0] * 3)

    assert found.token_ids[1] is None
    for row in (0, 2):
        assert found.token_ids[row] == expected.token_ids[row] is not None
        assert found.logprobs[row] == expected.logprobs[row]
        assert found.top[row] == expected.top[row]


def test_a_token_that_is_excluded_is_no_reason_to_refuse():
    logits = torch.tensor([[-math.inf, 0.0, 1.0]])

    assert sample(logits, [drawing(logprobs=1)], [0]).top[0][0][0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: give a whole number of at least 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"n": 0}, "n is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": "7"}, "seed is '7': give a whole number$"),
        ({"logprobs": -1}, "logprobs is -1: give a whole number of at least 0 and at most 20"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"temperature": -0.1}, "temperature is -0.1: give 0 or a positive number"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": False}, "temperature is False"),
        ({"top_p": 0}, "top_p is 0: give a number above 0, at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"stop": "###"}, "stop is '###': give a tuple of strings"),
        ({"stop": ("a", "")}, "stop is .'a', ''.: give a tuple of strings that are not empty"),
        ({"stop": (1,)}, "stop is"),
        ({"ignore_eos": 1}, "ignore_eos is 1: give True or False"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        SamplingParameters(**{"max_tokens": 1, **options})
