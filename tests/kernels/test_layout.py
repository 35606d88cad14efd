"""Slots, pages and the two orders in memory of a paged cache."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.kernels.layout import (
    MAX_PAGE_SIZE,
    PagedLayout,
    gather_tokens,
    is_page_size,
    kernel_view,
    slots_of,
)

page_sizes = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256])
orders = st.sampled_from(["NHD", "HND"])


@pytest.mark.parametrize("page_size", [2**i for i in range(9)])
def test_powers_of_two_up_to_the_largest_are_page_sizes(page_size):
    assert is_page_size(page_size)
    assert PagedLayout(page_size).page_size <= MAX_PAGE_SIZE


@pytest.mark.parametrize("page_size", [-16, -1, 0, 3, 12, 48, 65, 255, 257, 512, 2**20])
def test_other_page_sizes_are_refused_with_the_number(page_size):
    assert not is_page_size(page_size)
    with pytest.raises(ValueError, match=rf"page_size is {page_size}, .* power of two up to 256"):
        PagedLayout(page_size)


def test_an_unknown_order_is_refused_with_its_name_and_the_known_ones():
    with pytest.raises(ValueError, match=r"order is 'DHN'.*'NHD' or 'HND'"):
        PagedLayout(16, "DHN")


def test_kernels_are_given_the_bytes_of_codes_and_other_numbers_as_they_are():
    codes = torch.ones(2, 3).to(torch.float8_e4m3fn)
    assert kernel_view(codes).dtype == torch.uint8
    assert kernel_view(codes).data_ptr() == codes.data_ptr()
    numbers = codes.bfloat16()
    assert kernel_view(numbers) is numbers


def test_a_layout_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PagedLayout(16).page_size = 64


@given(page_sizes, st.integers(0, 10_000))
def test_pages_hold_the_tokens_and_no_page_is_too_many(page_size, tokens):
    pages = PagedLayout(page_size).pages_for(tokens)
    assert (pages - 1) * page_size < tokens <= pages * page_size or pages == tokens == 0


@given(page_sizes, orders, st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_both_orders_have_the_same_shape_and_contiguous_heads_of_a_token_or_tokens_of_a_head(
    page_size, order, pages, heads, dim
):
    layout = PagedLayout(page_size, order)
    cache = layout.empty(pages, heads, dim, dtype=torch.float8_e4m3fn, device=torch.device("cpu"))
    assert cache.shape == (pages, page_size, heads, dim)
    assert cache.dtype == torch.float8_e4m3fn
    per_token, per_head = (heads * dim, dim) if order == "NHD" else (dim, page_size * dim)
    assert cache.stride() == (page_size * heads * dim, per_token, per_head, 1)


@given(page_sizes, st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_a_slot_is_the_place_of_its_token(page_size, length, seed, wide):
    generator = torch.Generator().manual_seed(seed)
    pages = PagedLayout(page_size).pages_for(length)
    cache = torch.zeros(pages + 2, page_size, dtype=torch.int64)
    # what lies past the last used page has no meaning
    row = torch.cat(
        [torch.randperm(pages + 2, generator=generator)[:pages], torch.tensor([-1, 999])]
    )
    row = row if wide else row.int()
    positions = torch.arange(length, dtype=torch.int64 if wide else torch.int32)
    slots = slots_of(row, positions, page_size)
    assert slots.dtype == torch.int64
    cache.flatten()[slots] = torch.arange(length) + 1
    assert torch.equal(gather_tokens(cache, row, length), torch.arange(length) + 1)
    for position in {0, length // 2, length - 1}:
        page, offset = divmod(slots[position].item(), page_size)
        assert page == row[position // page_size]
        assert offset == position % page_size


def test_slots_beyond_int32_do_not_wrap():
    row = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert slots_of(row, torch.tensor([3], dtype=torch.int32), 64).item() == (2**31 - 1) * 64 + 3


def test_gathered_tokens_keep_dtype_and_trailing_dimensions_in_both_orders():
    row = torch.tensor([2, 0], dtype=torch.int32)
    for order in ("NHD", "HND"):
        cache = PagedLayout(4, order).empty(
            3, 2, 5, dtype=torch.float8_e5m2, device=torch.device("cpu")
        )
        cache.view(torch.uint8).copy_(torch.randint(0, 100, cache.shape, dtype=torch.uint8))
        tokens = gather_tokens(cache, row, 6)
        assert tokens.dtype == torch.float8_e5m2
        assert tokens.shape == (6, 2, 5)
        assert torch.equal(tokens[:4].view(torch.uint8), cache[2].view(torch.uint8))
        assert torch.equal(tokens[4:].view(torch.uint8), cache[0, :2].view(torch.uint8))


def test_no_token_is_no_page():
    assert gather_tokens(torch.zeros(2, 4, 3), torch.tensor([-1]), 0).shape == (0, 3)
