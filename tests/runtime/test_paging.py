"""The page allocator: nobody gets a page that another holds, and what is found again is what was looked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.paging import OutOfPages, PageAccountingError, PageAllocator

PAGE_SIZE = 2
NUM_PAGES = 7

# few different tokens, so that sequences often begin alike
tokens = st.lists(st.integers(0, 1), max_size=2 * PAGE_SIZE)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=3 * PAGE_SIZE)


def num_pages_of(token_ids):
    return -(-len(token_ids) // PAGE_SIZE)


def filled(allocator, token_ids):
    """Return pages that hold ``token_ids`` and are offered for reuse."""
    pages = allocator.allocate(-(-len(token_ids) // allocator.page_size))
    allocator.register(token_ids, pages)
    return pages


class EveryUse(RuleBasedStateMachine):
    """Sequences start, grow, are forked, registered and end in any order, as an engine lets them.

    ``content`` plays the cache: of each page, the tokens up to its end that its keys and values were computed from.
    """

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES, PAGE_SIZE)
        self.sequences = []  # [token_ids, pages]
        self.content = {}

    def write(self, token_ids, pages, first):
        for index in range(first, len(pages)):
            self.content[pages[index]] = tuple(token_ids[: (index + 1) * PAGE_SIZE])

    @rule(token_ids=prompts)
    def start(self, token_ids):
        matched = self.allocator.match_prefix(token_ids[:-1])
        for index, page in enumerate(matched):
            assert self.content[page] == tuple(token_ids[: (index + 1) * PAGE_SIZE])
        missing = num_pages_of(token_ids) - len(matched)
        before = self.allocator.num_free
        try:
            new = self.allocator.allocate(missing)
        except OutOfPages:
            assert missing > before == self.allocator.num_free
            self.allocator.free(matched)
            return
        assert not set(new) & {page for _, pages in self.sequences for page in pages}
        assert not set(new) & set(matched)
        self.write(token_ids, matched + new, len(matched))
        self.sequences.append([token_ids, matched + new])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=tokens)
    def grow(self, data, more):
        sequence = data.draw(st.sampled_from(self.sequences))
        token_ids, pages = sequence
        num_full = len(token_ids) // PAGE_SIZE
        longer = token_ids + more
        try:
            pages = pages + self.allocator.allocate(num_pages_of(longer) - len(pages))
        except OutOfPages:
            return
        self.write(longer, pages, num_full)
        sequence[:] = [longer, pages]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork_full_pages(self, data):
        token_ids, pages = data.draw(st.sampled_from(self.sequences))
        self.allocator.register(token_ids, pages)
        shared = self.allocator.match_prefix(token_ids)
        self.sequences.append([token_ids[: len(shared) * PAGE_SIZE], shared])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def register(self, data):
        self.allocator.register(*data.draw(st.sampled_from(self.sequences)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data):
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences = [other for other in self.sequences if other is not sequence]
        self.allocator.free(sequence[1])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def forget(self, data):
        token_ids, pages = data.draw(st.sampled_from(self.sequences))
        self.allocator.forget(pages)
        found = self.allocator.match_prefix(token_ids)
        assert not set(found) & set(pages)
        self.allocator.free(found)

    @invariant()
    def everything_adds_up(self):
        tables = [pages for _, pages in self.sequences]
        self.allocator.check(tables)
        used = {page for table in tables for page in table}
        assert self.allocator.num_free == NUM_PAGES - len(used)


TestEveryUse = EveryUse.TestCase
TestEveryUse.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=6),
    st.lists(st.integers(0, 1), max_size=14),
    st.integers(1, 4),
)
def test_the_longest_known_prefix_is_found(known, wanted, page_size):
    allocator = PageAllocator(100, page_size)
    for token_ids in known:
        allocator.free(filled(allocator, token_ids))

    def num_shared(token_ids):
        full = min(len(token_ids), len(wanted)) // page_size
        same = [token_ids[: n * page_size] == wanted[: n * page_size] for n in range(1, full + 1)]
        return sum(same)

    found = allocator.match_prefix(wanted)

    assert len(found) == max(map(num_shared, known), default=0)
    allocator.check([found])


def test_pages_are_offered_as_far_as_they_are_filled():
    allocator = PageAllocator(8, 2)
    pages = allocator.allocate(3)
    allocator.register([1, 2, 3, 4, 5, 6], pages, num_tokens=5)
    found = allocator.match_prefix([1, 2, 3, 4, 5, 6])
    assert found == pages[:2]
    allocator.check([pages, found])


def test_the_same_tokens_after_another_beginning_are_another_page():
    allocator = PageAllocator(8, 2)
    filled(allocator, [1, 2, 3, 4])

    assert allocator.match_prefix([3, 4]) == []
    assert len(allocator.match_prefix([1, 2, 3, 4])) == 2


def test_a_page_that_is_not_full_is_not_found():
    allocator = PageAllocator(8, 4)
    pages = allocator.allocate(2)
    allocator.register([1, 2, 3, 4, 5, 6, 7], pages)

    assert allocator.match_prefix([1, 2, 3, 4, 5, 6, 7, 8]) == pages[:1]


def test_registering_as_pages_fill_equals_registering_at_once():
    allocator = PageAllocator(8, 2)
    token_ids = [1, 2, 3, 4, 5, 6, 7]
    pages = allocator.allocate(4)
    for length in range(len(token_ids) + 1):
        allocator.register(token_ids[:length], pages)

    assert allocator.match_prefix(token_ids) == pages[:3]


def test_a_shared_page_is_free_when_the_last_holder_gives_it_back():
    allocator = PageAllocator(2, 2)
    pages = allocator.allocate(2)
    allocator.register([1, 2, 3, 4], pages)
    assert allocator.match_prefix([1, 2, 3, 4]) == pages

    allocator.free(pages)
    assert allocator.num_free == 0
    allocator.free(pages)
    assert allocator.num_free == 2


def test_pages_are_taken_all_or_none():
    allocator = PageAllocator(3, 2)
    allocator.allocate(1)

    with pytest.raises(OutOfPages, match="3 pages are wanted and 2 can be had"):
        allocator.allocate(3)

    assert allocator.num_free == 2
    assert allocator.allocate(0) == []


def test_free_pages_are_taken_before_what_can_be_reused():
    allocator = PageAllocator(4, 2)
    kept = filled(allocator, [1, 2])
    allocator.free(kept)

    assert kept[0] not in allocator.allocate(3)
    assert allocator.num_cached == 1
    assert allocator.match_prefix([1, 2]) == kept


def test_the_least_recently_used_is_evicted_first_and_ends_before_beginnings():
    allocator = PageAllocator(4, 2)
    first = filled(allocator, [1, 2, 3, 4])
    second = filled(allocator, [5, 6, 7, 8])
    allocator.free(first)
    allocator.free(second)
    allocator.free(allocator.match_prefix([1, 2, 3, 4]))  # now the first is the last that was used

    order = [allocator.allocate(1)[0] for _ in range(4)]

    assert order == [second[1], second[0], first[1], first[0]]
    assert allocator.match_prefix([1, 2]) == []


def test_of_two_pages_with_equal_content_one_is_kept():
    allocator = PageAllocator(4, 2)
    one, other = filled(allocator, [1, 2]), filled(allocator, [1, 2])
    allocator.free(one)
    allocator.free(other)

    assert allocator.num_cached == 1
    allocator.check([])
    assert allocator.match_prefix([1, 2]) == one


def test_giving_back_an_equal_page_counts_as_using_the_one_that_is_kept():
    allocator = PageAllocator(3, 2)
    one, equal, other = (filled(allocator, token_ids) for token_ids in ([1, 2], [1, 2], [5, 6]))
    for pages in (one, other, equal):
        allocator.free(pages)

    assert allocator.allocate(2) == equal + other
    assert allocator.match_prefix([1, 2]) == one


def test_the_second_of_two_equal_pages_takes_the_place_of_the_first_that_was_evicted():
    allocator = PageAllocator(2, 2)
    one, other = filled(allocator, [1, 2]), filled(allocator, [1, 2])
    allocator.free(one)
    assert allocator.allocate(1) == one
    allocator.check([one, other])
    allocator.free(other)

    assert allocator.match_prefix([1, 2]) == other
    allocator.check([one, other])


@pytest.mark.parametrize("method", ["free", "forget"])
def test_a_page_that_nobody_holds_cannot_be_given_back_or_forgotten(method):
    allocator = PageAllocator(2, 2)
    pages = allocator.allocate(1)
    allocator.free(pages)

    with pytest.raises(PageAccountingError, match=f"page {pages[0]} is used by nobody"):
        getattr(allocator, method)(pages)


def test_a_page_that_nobody_holds_cannot_be_registered():
    allocator = PageAllocator(2, 2)

    with pytest.raises(PageAccountingError, match="page 1 is used by nobody"):
        allocator.register([1, 2], [1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda allocator: allocator._free.pop(), "are not the 4 pages"),
        (lambda allocator: allocator._free.append(0), "are not the 4 pages"),
        (lambda allocator: allocator._hash_of.update({3: b"x"}), "page 3 is free, but its"),
        (lambda allocator: allocator._page_of.clear(), "is cached, but cannot be found"),
        (lambda allocator: allocator._page_of.update({b"x": 0}), "a hash that is not its own"),
        (
            lambda allocator: allocator._references.update({1: 2}),
            "page 1 has 2 references, but 1 sequences",
        ),
        (lambda allocator: allocator.allocate(1), "has 1 references, but 0 sequences"),
    ],
)
def test_the_check_sees_what_is_wrong(damage, message):
    allocator = PageAllocator(4, 2)
    cached = filled(allocator, [1, 2])
    used = allocator.allocate(1)
    allocator.free(cached)
    allocator.check([used])
    assert (cached, used) == ([0], [1])

    damage(allocator)

    with pytest.raises(PageAccountingError, match=message):
        allocator.check([used])


@pytest.mark.parametrize(("pages", "size", "name"), [(0, 2, "num_pages"), (2, 0, "page_size")])
def test_a_cache_without_room_is_refused(pages, size, name):
    with pytest.raises(RequestError, match=f"{name} is 0: give at least 1"):
        PageAllocator(pages, size)
