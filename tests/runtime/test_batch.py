"""A batch says of every new token where it stands and where it is kept."""

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.runtime.batch import make_batch


def test_a_ragged_batch_is_packed_in_order():
    batch = make_batch([([7, 8, 9], 3, [5, 2]), ([4], 0, [9])], page_size=4, device="cpu")

    assert batch.token_ids.tolist() == [7, 8, 9, 4]
    assert batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.slots.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 9 * 4]
    assert batch.page_table.tolist() == [[5, 2], [9, -1]]
    assert batch.prefix_lens.tolist() == [3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.seq_lens.tolist() == [6, 1]
    assert (batch.max_new_tokens, batch.max_prefix_len, batch.max_seq_len) == (3, 3, 6)
    assert not batch.is_decode
    assert (batch.num_tokens, batch.num_sequences) == (4, 2)


def test_the_types_are_those_that_the_kernels_ask_for():
    batch = make_batch([([1, 2], 0, [0])], page_size=16, device="cpu")

    wide = (batch.token_ids, batch.positions, batch.slots)
    assert [tensor.dtype for tensor in wide] == [torch.int64] * 3
    narrow = (batch.page_table, batch.prefix_lens, batch.cu_seqlens, batch.seq_lens)
    assert [tensor.dtype for tensor in narrow] == [torch.int32] * 4


def test_one_new_token_for_each_sequence_is_a_decode_step():
    assert make_batch([([1], 5, [0, 1]), ([2], 0, [2])], 4, "cpu").is_decode
    assert not make_batch([([1], 5, [0, 1]), ([2, 3], 0, [2])], 4, "cpu").is_decode


@pytest.mark.parametrize(
    ("new", "num_decodes"), [((1, 1), 2), ((1, 2), 1), ((2, 1), 0), ((1, 1, 3, 1), 2), ((4,), 0)]
)
def test_the_decodes_are_those_before_the_first_with_several_tokens(new, num_decodes):
    batch = make_batch([([5] * count, 2, [0, 1]) for count in new], 4, "cpu")
    assert batch.num_decodes == num_decodes
    assert batch.is_decode == (num_decodes == len(new))


def test_the_longest_prefix_of_those_that_do_not_decode_is_known():
    decode, early, late = ([1], 7, [0, 1]), ([1, 2], 3, [2, 3]), ([1, 2], 5, [4, 5])
    assert make_batch([decode, early, late], 4, "cpu").max_prefill_prefix_len == 5
    assert make_batch([decode, decode], 4, "cpu").max_prefill_prefix_len == 0
    assert make_batch([early, decode], 4, "cpu").max_prefill_prefix_len == 7


def test_pages_of_all_kinds_of_sequences_are_taken():
    kinds = (list, tuple, lambda pages: array("i", pages), lambda pages: array("q", pages))
    for kind in kinds:
        batch = make_batch([([1], 6, kind([5, 2, 8])), ([1], 0, kind([3]))], 4, "cpu")
        assert batch.page_table.tolist() == [[5, 2], [3, -1]]
        assert batch.slots.tolist() == [2 * 4 + 2, 3 * 4]


def test_every_tensor_starts_at_a_multiple_of_sixteen_bytes():
    batch = make_batch([([1, 2, 3], 2, [0, 1]), ([1], 6, [2, 3]), ([1], 3, [4])], 4, "cpu")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    # torch's own memory on the CPU starts at a multiple of 64
    assert [tensor.data_ptr() % 16 for tensor in tensors] == [0] * 7
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_later_changes_of_the_pages_do_not_reach_the_batch():
    pages = array("i", [4, 7])
    batch = make_batch([([1], 5, pages)], 4, "cpu")
    pages[0] = 9
    pages.append(1)
    assert batch.page_table.tolist() == [[4, 7]]


def test_pages_beyond_the_last_token_are_left_out_of_the_table():
    batch = make_batch([([1], 3, [6, 7, 8])], page_size=4, device="cpu")
    assert batch.page_table.tolist() == [[6]]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    page_size=st.sampled_from([1, 4, 16]),
)
def test_every_token_has_the_slot_that_its_position_and_its_pages_say(lengths, page_size):
    sequences, next_page = [], 0
    for new, prefix in lengths:
        count = -(-(new + prefix) // page_size)
        pages = list(range(next_page, next_page + count))[::-1]
        sequences.append((list(range(new)), prefix, pages))
        next_page += count

    batch = make_batch(sequences, page_size, "cpu")

    expected = [
        (number, prefix + i)
        for number, (ids, prefix, _) in enumerate(sequences)
        for i in range(len(ids))
    ]
    assert list(zip(batch.token_sequences().tolist(), batch.positions.tolist(), strict=True)) == (
        expected
    )
    assert batch.slots.tolist() == [
        sequences[number][2][position // page_size] * page_size + position % page_size
        for number, position in expected
    ]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "at least one sequence"),
        ([([], 3, [0])], "sequence 0 has 0 new tokens behind 3"),
        ([([1], 0, [0]), ([1], -1, [0])], "sequence 1 has 1 new tokens behind -1"),
        ([([1], 4, [0])], "sequence 0 has 1 pages, but its 5 tokens need 2"),
    ],
)
def test_what_is_no_batch_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        make_batch(sequences, 4, "cpu")


def test_a_page_size_that_the_kernels_do_not_take_is_refused():
    with pytest.raises(ValueError, match="page_size is 3"):
        make_batch([([1], 0, [0])], 3, "cpu")
