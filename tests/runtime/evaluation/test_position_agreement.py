"""Agreement by position."""

import pytest
import torch

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.agreement import Agreement, measure_agreement
from fp8kv.runtime.evaluation.position_agreement import (
    PositionAgreement,
    PositionBucket,
    forced_pieces,
    measure_positions,
)

BOUNDS = [(0, 127), (128, 255), (256, 511), (512, 1023), (1024, 2047)]


def logits(count, vocabulary=6):
    baseline = torch.randn(count, vocabulary, dtype=torch.float64)
    arm = baseline + 0.3 * torch.randn(count, vocabulary, dtype=torch.float64)
    return arm, baseline, torch.randint(vocabulary, (count,))


def rounded(agreement):
    return {name: pytest.approx(value) for name, value in vars(agreement).items()}


@pytest.mark.parametrize(("first", "count"), [(1, 1500), (0, 128), (127, 2), (1023, 2), (300, 1)])
def test_each_token_falls_into_the_bucket_of_its_position(first, count):
    arm, baseline, tokens = logits(count)
    found = measure_positions(arm, baseline, tokens, first)

    expected = []
    for low, high in BOUNDS:
        rows = [row for row in range(count) if low <= first + row <= high]
        if rows:
            part = measure_agreement(arm[rows], baseline[rows], tokens[rows])
            expected.append(PositionBucket(low, high, part))
    assert found.buckets == tuple(expected)


def test_far_positions_have_buckets_too():
    arm, baseline, tokens = logits(2)
    found = measure_positions(arm, baseline, tokens, (1 << 20) - 1)
    assert [(bucket.first, bucket.last) for bucket in found.buckets] == [
        (1 << 19, (1 << 20) - 1),
        (1 << 20, (1 << 21) - 1),
    ]


def test_pieces_merge_in_any_order_to_what_the_whole_gives():
    arm, baseline, tokens = logits(700)
    whole = measure_positions(arm, baseline, tokens, 1)
    pieces = [
        measure_positions(arm[cut], baseline[cut], tokens[cut], 1 + cut.start)
        for cut in (slice(400, 700), slice(0, 100), slice(100, 400))
    ]
    merged = PositionAgreement()
    for piece in pieces:
        merged = merged.merge(piece)

    for found, expected in zip(merged.buckets, whole.buckets, strict=True):
        assert (found.first, found.last) == (expected.first, expected.last)
        assert vars(found.agreement) == rounded(expected.agreement)
    assert vars(merged.total) == rounded(measure_agreement(arm, baseline, tokens))
    assert merged.merge(PositionAgreement()) == merged


def test_without_tokens_there_are_no_buckets():
    empty = measure_positions(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0).long(), 5)
    assert empty == PositionAgreement()
    assert empty.total == Agreement()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_rows_that_do_not_belong_together_are_refused(which):
    parts = list(logits(5))
    parts[which] = parts[which][:4]
    with pytest.raises(EvaluationError, match="row i must predict reference token i"):
        measure_positions(*parts, 0)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_a_text_is_cut_into_answers_with_all_of_the_text_before_them(rows):
    text = list(range(10))
    pieces = forced_pieces(text, rows)
    assert [token for _, answer in pieces for token in answer] == text[1:]
    for prompt, answer in pieces:
        assert [*prompt, *answer] == text[: len(prompt) + len(answer)]
        assert 1 <= len(answer) <= rows
    assert forced_pieces([1], 3) == []
