"""Who computes what in a step, and who gives pages back."""

import pytest

from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.scheduler import Continuation, Scheduler

PAGE = 4


def make(num_pages=100, budget=16, sequences=8):
    allocator = PageAllocator(num_pages, PAGE)
    return Scheduler(allocator, max_batch_tokens=budget, max_sequences=sequences)


def prompt(request_id, length, start=0):
    """A continuation whose tokens nobody else has, from ``start`` on."""
    tokens = [*range(start), *(1000 * (request_id + 1) + i for i in range(start, length))]
    return Continuation(request_id, 0, tokens, length)


def run(scheduler):
    """Run one step of a model that answers 7; return who computed how much."""
    work = scheduler.schedule()
    done = [part.continuation for part in work if part.is_last_chunk]
    counts = {part.continuation.request_id: len(part.token_ids) for part in work}
    assert len(counts) == len(work), "nobody is there twice"
    assert sum(counts.values()) <= scheduler.max_batch_tokens
    assert len(done) >= len(work) - 1
    assert all(part.is_last_chunk for part in work[:-1])
    for part in work:
        continuation = part.continuation
        end = continuation.num_cached + part.num_tokens
        assert end <= len(continuation.pages) * PAGE
    scheduler.advance(work)
    for continuation in done:
        continuation.token_ids.append(7)
    scheduler.allocator.check()
    return counts


def test_a_long_prompt_is_computed_in_chunks_and_others_decode_meanwhile():
    scheduler = make(budget=10)
    scheduler.add(prompt(0, 3))
    assert run(scheduler) == {0: 3}
    scheduler.add(prompt(1, 20))
    assert [run(scheduler) for _ in range(4)] == [
        {0: 1, 1: 9},
        {0: 1, 1: 9},
        {0: 1, 1: 2},
        {0: 1, 1: 1},
    ]


def test_prompts_share_a_step_up_to_the_budget():
    scheduler = make(budget=10)
    for request_id in range(4):
        scheduler.add(prompt(request_id, 4))
    assert run(scheduler) == {0: 4, 1: 4, 2: 2}
    assert run(scheduler) == {0: 1, 1: 1, 2: 2, 3: 4}


def test_no_more_continuations_than_seats():
    scheduler = make(sequences=2)
    for request_id in range(3):
        scheduler.add(prompt(request_id, 2))
    assert set(run(scheduler)) == {0, 1}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_there_are_never_more_seats_than_the_budget_has_tokens():
    scheduler = make(budget=2, sequences=8)
    for request_id in range(4):
        scheduler.add(prompt(request_id, 1))
    assert run(scheduler) == {0: 1, 1: 1}
    assert run(scheduler) == {0: 1, 1: 1}


def test_the_queue_is_first_come_first_served_even_where_a_later_one_would_fit():
    scheduler = make(num_pages=4)
    for request_id, length in enumerate((8, 12, 1)):
        scheduler.add(prompt(request_id, length))
    assert run(scheduler) == {0: 8}
    assert scheduler.num_waiting == 2


def test_the_latest_gives_its_pages_back_and_is_recomputed_with_what_it_said():
    scheduler = make(num_pages=4, budget=32)
    first, second = prompt(0, 6), prompt(1, 7)
    scheduler.add(first)
    scheduler.add(second)
    assert run(scheduler) == {0: 6, 1: 7}
    assert [run(scheduler) for _ in range(1)] == [{0: 1, 1: 1}]
    # both have filled two pages by now or will: the older gets the page of the younger
    assert [run(scheduler) for _ in range(2)] == [{0: 1}, {0: 1}]
    assert scheduler.num_preemptions == 1
    assert (len(second.pages), second.num_cached) == (0, 0)
    scheduler.remove(first)
    assert len(second.token_ids) == 9
    # its first page is still in the cache, and what it had said is computed once more
    assert sum(run(scheduler).values()) <= 9
    assert second.num_generated == 3


def test_who_lost_its_pages_is_the_next_to_get_some():
    scheduler = make(num_pages=4, sequences=2, budget=32)
    for request_id in range(3):
        scheduler.add(prompt(request_id, 8))
    assert set(run(scheduler)) == {0, 1}
    assert set(run(scheduler)) == {0}, "1 gave its pages back for it"
    scheduler.remove(scheduler._running[0])
    assert list(run(scheduler)) == [1], "before 2, which never had any"


def test_who_is_alone_preempts_nobody_and_goes_to_the_last_page():
    scheduler = make(num_pages=3)
    alone = prompt(0, 1)
    scheduler.add(alone)
    for _ in range(3 * PAGE):
        assert run(scheduler) == {0: 1}
    assert (scheduler.num_preemptions, scheduler.allocator.num_free) == (0, 0)


def test_a_known_prefix_is_not_computed_again():
    scheduler = make()
    scheduler.add(prompt(0, 11, start=9))
    run(scheduler)
    scheduler.add(prompt(1, 12, start=9))
    assert run(scheduler) == {0: 1, 1: 4}, "two full pages are shared"
    assert scheduler.num_reused_tokens == 8


def test_of_a_prompt_that_is_known_whole_the_last_page_is_computed():
    scheduler = make()
    for _ in range(2):
        scheduler.add(prompt(0, 8))
        counts = run(scheduler)
        scheduler.remove(scheduler._running[0])
    assert counts == {0: 4}


def test_first_in_the_queue_are_those_that_are_put_there():
    scheduler = make(sequences=1)
    waiting = [prompt(request_id, 1) for request_id in range(3)]
    scheduler.add(waiting[0])
    scheduler.add_first(waiting[1:])
    assert set(run(scheduler)) == {1}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_is_removed_leaves_nothing(steps):
    scheduler = make(num_pages=6, budget=6)
    everybody = [prompt(request_id, 9) for request_id in range(3)]
    for continuation in everybody:
        scheduler.add(continuation)
    for _ in range(steps):
        run(scheduler)
    for continuation in everybody:
        scheduler.remove(continuation)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.allocator.num_free == 6
    assert scheduler.schedule() == []
    scheduler.allocator.check()


def launch(scheduler):
    """Launch a step whose tokens nobody reads yet; return who gets one."""
    work = scheduler.schedule()
    ready = [part.continuation for part in work if part.is_last_chunk]
    scheduler.advance(work)
    for continuation in ready:
        continuation.num_unread += 1
    scheduler.allocator.check()
    return ready


def read(*continuations):
    for continuation in continuations:
        continuation.num_unread -= 1
        continuation.token_ids.append(7)


def test_the_step_after_an_unread_token_computes_it():
    scheduler = make()
    one = prompt(0, 6)
    scheduler.add(one)
    assert launch(scheduler) == [one]
    (part,) = scheduler.schedule()
    assert (part.token_ids, one.num_cached, one.num_generated) == ([0], 6, 1)
    assert part.is_last_chunk


def test_pages_are_offered_as_far_as_their_tokens_are_known():
    scheduler = make()
    one = prompt(0, 7)
    scheduler.add(one)
    launch(scheduler)
    launch(scheduler)
    assert (one.num_cached, one.num_registered) == (8, 1)
    read(one)
    launch(scheduler)
    assert one.num_registered == 2


def test_who_is_done_computes_nothing_more_and_keeps_its_pages_until_they_are_needed():
    scheduler = make(num_pages=4)
    older, done = prompt(0, 8), prompt(1, 7)
    scheduler.add(older)
    scheduler.add(done)
    launch(scheduler)
    done.is_done = True
    assert len(done.pages) == 2
    assert launch(scheduler) == [older], "it needs a page more"
    assert len(done.pages) == 0
    assert (scheduler.num_waiting, scheduler.num_preemptions) == (0, 0)
    assert scheduler.allocator.match_prefix(done.token_ids) == []
    scheduler.remove(done)


def test_who_was_preempted_waits_until_its_token_is_read():
    scheduler = make(num_pages=5)
    older, younger, done = prompt(0, 8), prompt(1, 4), prompt(2, 8)
    for continuation in (older, younger, done):
        scheduler.add(continuation)
    launch(scheduler)
    done.is_done = True
    # first the done one goes, whose pages suffice for both
    assert launch(scheduler) == [older, younger]
    assert scheduler.num_preemptions == 0
    scheduler._preempt_latest()
    younger.num_unread = 1
    assert launch(scheduler) == [older]
    read(younger)
    assert younger in launch(scheduler)
