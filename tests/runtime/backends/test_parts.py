"""A batch in two: what decodes and what prefills, each as if it were alone."""

import torch

from fp8kv.runtime.backends.parts import BatchParts
from fp8kv.runtime.batch import make_batch

PAGE_SIZE = 4
DECODES = [([5], 6, [3, 1]), ([7], 0, [2])]
PREFILLS = [([1, 2, 3], 4, [0, 6]), ([8, 9], 0, [5])]


def assert_same(found, expected):
    for name, value in vars(expected).items():
        own = getattr(found, name)
        if not isinstance(value, torch.Tensor):
            # bounds: no tighter than the whole batch's
            assert own >= value, name
        elif name == "page_table":
            assert torch.equal(own[:, : value.shape[1]], value), name
        else:
            assert torch.equal(own, value), name


def test_each_part_is_the_batch_of_its_own_sequences():
    batch = make_batch([*DECODES, *PREFILLS], PAGE_SIZE, "cpu")
    decodes, prefills = BatchParts().of(batch)
    assert_same(decodes, make_batch(DECODES, PAGE_SIZE, "cpu"))
    assert decodes.is_decode
    assert decodes.max_new_tokens == 1
    assert_same(prefills, make_batch(PREFILLS, PAGE_SIZE, "cpu"))
    assert (prefills.num_decodes, prefills.max_prefix_len) == (0, 4)


def test_a_batch_of_one_kind_is_not_cut():
    decodes, prefills = (make_batch(part, PAGE_SIZE, "cpu") for part in (DECODES, PREFILLS))
    parts = BatchParts()
    assert parts.of(decodes) == (decodes, None)
    assert parts.of(prefills) == (None, prefills)


def test_a_batch_is_cut_once():
    parts = BatchParts()
    batch = make_batch([*DECODES, *PREFILLS], PAGE_SIZE, "cpu")
    first, again = parts.of(batch), parts.of(batch)
    assert first[0] is again[0]
    assert first[1] is again[1]
    other = make_batch([*DECODES, *PREFILLS], PAGE_SIZE, "cpu")
    assert parts.of(other)[0] is not first[0]


def test_parts_begin_where_kernels_are_compiled_for():
    batch = make_batch([DECODES[1], *PREFILLS], PAGE_SIZE, "cpu")
    _, prefills = BatchParts().of(batch)
    tensors = [value for value in vars(prefills).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
