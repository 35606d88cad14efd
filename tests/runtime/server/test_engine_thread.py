"""The thread that owns the engine: order, fairness, cancellation, and that nobody waits for ever."""

import asyncio

import pytest

pytest.importorskip("fastapi")

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.sampling import SamplingParameters
from fp8kv.runtime.server.engine_thread import EngineThread
from fp8kv.runtime.server.jobs import Accepted, EngineStopped, Scored, Step, Work

SHORT = SamplingParameters(max_tokens=4, ignore_eos=True)


def run(llm, scenario):
    """Run a scenario on an engine thread, which is stopped in the end."""

    async def main():
        thread = EngineThread(llm)
        thread.start()
        try:
            return await asyncio.wait_for(scenario(thread), 20)
        finally:
            if llm.permits is not None:
                llm.permits.release(10_000)
            await thread.stop()

    result = asyncio.run(main())
    status = llm.engine.status
    assert status.num_free_pages == status.num_pages
    return result


async def collect(thread, job, count):
    """Return so many events."""
    return [await job.events.get() for _ in range(count)]


def test_events_come_in_order(llm):
    async def scenario(thread):
        job = thread.submit(Work(((1, 2, 3), (4, 5)), SHORT, num_alternatives=1))
        found = await collect(thread, job, 3 + 8)
        thread.withdraw(job)
        return found

    found = run(llm, scenario)
    assert [type(event) for event in found] == [Scored, Scored, Accepted] + [Step] * 8
    assert [event.prompt for event in found[:2]] == [0, 1]
    assert {event.prompt for event in found[3:]} == {0, 1}


def test_scores_alone_generate_nothing(llm):
    async def scenario(thread):
        job = thread.submit(Work(((1, 2, 3),), None, num_alternatives=0))
        return await collect(thread, job, 2)

    assert [type(event) for event in run(llm, scenario)] == [Scored, Accepted]
    assert llm.engine.status.num_generated_tokens == 0


def test_generation_goes_on_between_the_prompts_that_are_scored(llm):
    order = []
    forward, score = llm.model.forward, llm.teacher_forced
    llm.model.forward = lambda batch: order.append("step") or forward(batch)
    llm.teacher_forced = lambda sequences: order.append("score") or score(sequences)

    async def scenario(thread):
        permits = llm.hold()
        first = thread.submit(Work(((1, 2, 3),), SHORT))
        second = thread.submit(Work(((1, 2),) * 3, None, num_alternatives=0))
        permits.release(100)
        await collect(thread, second, 4)
        await collect(thread, first, 5)

    run(llm, scenario)
    assert "score,step,score,step,score" in ",".join(order)


def test_a_prompt_that_is_refused_refuses_the_whole_job(llm):
    async def scenario(thread):
        job = thread.submit(Work(((1, 2), (1,) * 500), SHORT))
        (event,) = await collect(thread, job, 1)
        other = thread.submit(Work(((1, 2),), SHORT))
        assert len(await collect(thread, other, 5)) == 5
        return event

    event = run(llm, scenario)
    assert isinstance(event, RequestError)
    assert llm.engine.status.num_generated_tokens == 4


def test_what_is_withdrawn_while_it_waits_in_line_never_runs(fake_llm):
    llm = fake_llm(num_pages=4, page_size=4)
    permits = llm.hold()

    async def scenario(thread):
        holder = thread.submit(Work(((1,) * 9,), SHORT))
        permits.release(2)
        await collect(thread, holder, 2)
        # needs all pages, so it waits, and so does who comes behind it
        waiting = thread.submit(Work(((2,) * 16,), None, num_alternatives=0))
        behind = thread.submit(Work(((3, 4),), SHORT))
        permits.release(1)
        await collect(thread, holder, 1)
        assert waiting.events.empty()
        assert behind.events.empty()
        thread.withdraw(waiting)
        permits.release(100)
        assert isinstance((await collect(thread, behind, 1))[0], Accepted)
        assert waiting.events.empty()

    run(llm, scenario)


def test_nobody_overtakes_a_prompt_that_waits_for_pages(fake_llm):
    llm = fake_llm(num_pages=4, page_size=4)
    permits = llm.hold()

    async def scenario(thread):
        holder = thread.submit(Work(((1,) * 9,), SHORT))
        permits.release(2)
        await collect(thread, holder, 2)
        waiting = thread.submit(Work(((2,) * 16,), None, num_alternatives=0))
        behind = thread.submit(Work(((3, 4),), SHORT))
        permits.release(100)
        first = await waiting.events.get()
        assert isinstance(first, Scored)
        assert isinstance(await behind.events.get(), Accepted)
        assert holder.events.qsize() == 3

    run(llm, scenario)


def test_who_is_under_way_when_it_stops_is_told(llm):
    permits = llm.hold()

    async def scenario(thread):
        job = thread.submit(Work(((1, 2),), SHORT))
        permits.release(1)
        assert isinstance(await job.events.get(), Accepted)
        stopping = asyncio.ensure_future(thread.stop())
        await asyncio.sleep(0)
        permits.release(100)
        await stopping
        events = [job.events.get_nowait() for _ in range(job.events.qsize())]
        assert isinstance(events[-1], EngineStopped)
        assert not events[-1].is_failure
        with pytest.raises(EngineStopped):
            thread.submit(Work(((1, 2),), SHORT))
        assert await thread.cache_counts() == {}

    run(llm, scenario)


def test_who_is_in_the_inbox_when_the_engine_fails_is_told(llm):
    permits = llm.hold()

    async def scenario(thread):
        jobs = [thread.submit(Work(((1, 2),), SHORT))]
        assert isinstance(await jobs[0].events.get(), Accepted)
        llm.model.fails = True
        # the thread is inside a step and reads its inbox no more
        jobs += [thread.submit(Work(((1, 2),), SHORT)) for _ in range(3)]
        counting = asyncio.ensure_future(thread.cache_counts())
        await asyncio.sleep(0)
        permits.release(1)
        for job in jobs:
            event = await job.events.get()
            assert isinstance(event, EngineStopped)
            assert event.is_failure
            assert "the model broke" in str(event)
            thread.withdraw(job)
        assert await counting == {}

    async def main():
        thread = EngineThread(llm)
        thread.start()
        await asyncio.wait_for(scenario(thread), 20)
        await thread.stop()

    asyncio.run(main())


def test_withdrawing_twice_does_nothing(llm):
    async def scenario(thread):
        job = thread.submit(Work(((1, 2),), SHORT))
        await collect(thread, job, 5)
        thread.withdraw(job)
        thread.withdraw(job)
        again = thread.submit(Work(((1, 2),), SHORT))
        assert len(await collect(thread, again, 5)) == 5

    run(llm, scenario)


def test_an_answer_of_an_idle_engine_comes_when_it_is_asked(llm):
    async def scenario(thread):
        assert await thread.cache_counts() == {}
        llm.counts = {"layer": None}
        # that nobody counts is found out once
        assert await thread.cache_counts() == {}

    run(llm, scenario)
