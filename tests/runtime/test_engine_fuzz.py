"""Whatever arrives, is cancelled, preempted, cut into chunks or fails: everybody says what they say alone."""

from collections import defaultdict
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.demo import MODELS
from fp8kv.runtime.llm import LLM, load
from fp8kv.runtime.requests import Request, join_outputs
from fp8kv.runtime.sampling import SamplingParameters


@pytest.fixture(scope="module")
def kit(fake_model, byte_tokenizer):
    return fake_model.EngineKit(byte_tokenizer)


def request(token_ids, **parameters):
    return Request(tuple(token_ids), SamplingParameters(**parameters))


requests = st.builds(
    request,
    # few letters, so that prompts have prefixes in common; the last one makes the model fail now and then
    st.text("xxyy!", min_size=1, max_size=24).map(str.encode),
    max_tokens=st.integers(1, 14),
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 9),
    stop=st.sampled_from([(), ("a",), ("ab",), ("c", "dda")]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
)


class Run:
    """Steps an engine through what happens around it; checks the pages after every step."""

    def __init__(self, engine, cancels, failures=(), model=None):
        self.engine = engine
        self.cancels = cancels
        self.failures = failures
        self.model = model
        self.added = []
        self.cancelled = set()
        self.outputs = defaultdict(list)
        self.num_steps = 0

    def step(self):
        for at, victim in self.cancels:
            if at == self.num_steps and victim < len(self.added) and self.engine.cancel(victim):
                self.cancelled.add(victim)
        if self.num_steps in self.failures:
            self.model.fails = True
            with suppress(RuntimeError):  # where there is nothing to compute there is no failure
                self.note(self.engine.step())
            self.model.fails = False
            self.check()
        self.note(self.engine.step())
        self.check()
        self.num_steps += 1
        assert self.num_steps < 2000, "everybody ends"

    def note(self, outputs):
        for output in outputs:
            assert output.request_id not in self.cancelled
            steps = self.outputs[output.request_id, output.index]
            assert not steps or steps[-1].finish_reason is None, "nothing comes after the end"
            steps.append(output)

    def check(self):
        running = [continuation.pages for continuation in self.engine._scheduler._running]
        self.engine._allocator.check(running)

    def all(self, arrivals):
        for one, pause in arrivals:
            assert self.engine.add(one) == len(self.added)
            self.added.append(one)
            for _ in range(pause):
                self.step()
        while self.engine.has_work:
            self.step()
        self.engine._allocator.check([])
        return self

    def compare(self, alone):
        """Compare with what each request says alone; what was cancelled has a beginning of it."""
        for request_id, one in enumerate(self.added):
            for index, expected in enumerate(alone(one)):
                steps = self.outputs[request_id, index]
                if request_id in self.cancelled and not (steps and steps[-1].finish_reason):
                    found = tuple(token for output in steps for token in output.token_ids)
                    assert found == expected.token_ids[: len(found)]
                    assert expected.text.startswith("".join(output.text for output in steps))
                else:
                    assert join_outputs(steps) == expected


def room(arrivals, page_size):
    """The least pages that may be."""
    longest = max(len(one.prompt_token_ids) + one.parameters.max_tokens - 1 for one, _ in arrivals)
    return -(-longest // page_size)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(requests, st.integers(0, 3)), min_size=1, max_size=8),
    cancels=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), max_size=4),
    failures=st.sets(st.integers(0, 30), max_size=3),
    page_size=st.sampled_from([1, 2, 4, 8]),
    spare_pages=st.integers(0, 12),
    max_batch_tokens=st.integers(1, 40),
    max_sequences=st.integers(3, 8),
)
def test_over_a_model_that_remembers_every_token(
    kit, arrivals, cancels, failures, page_size, spare_pages, max_batch_tokens, max_sequences
):
    engine, model = kit.make(
        num_pages=room(arrivals, page_size) + spare_pages,
        page_size=page_size,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )
    run = Run(engine, cancels, failures, model).all(arrivals)
    kit.assert_clean(engine)
    run.compare(kit.alone)
    if not run.cancelled:
        handed_out = sum(
            len(output.token_ids) for steps in run.outputs.values() for output in steps
        )
        assert engine.status.num_generated_tokens == handed_out, "what is dropped is not counted"


def test_the_fuzz_has_what_it_needs_preemption_chunks_reuse_stops_and_errors(kit):
    engine, model = kit.make(num_pages=9, max_batch_tokens=7)
    arrivals = [
        (request(("x" * 13 + tail).encode(), max_tokens=12, ignore_eos=True, stop=stop), 0)
        for tail, stop in (("a", ()), ("b", ()), ("c", ()), ("!", ()), ("d", ("d",)))
    ]
    run = Run(engine, ()).all(arrivals)
    status = engine.status
    assert status.num_preemptions > 0
    assert status.num_reused_tokens > 0
    assert any(batch.max_prefix_len and not batch.is_decode for batch in model.batches)
    reasons = {steps[-1].finish_reason for steps in run.outputs.values()}
    assert reasons == {"length", "stop", "error"}


@pytest.fixture(scope="module", params=["tiny-minimax-m2", "tiny-deepseek-v3"])
def loaded(request):
    return load(MODELS[request.param], device="cpu")


trained_requests = st.builds(
    request,
    st.lists(st.sampled_from([40, 41, 42]), min_size=1, max_size=12),
    max_tokens=st.integers(1, 6),
    n=st.sampled_from([1, 1, 2]),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
    seed=st.integers(0, 9),
    stop=st.sampled_from([(), ("e",), (" ",)]),
)


@pytest.fixture(scope="module")
def trained(loaded):
    """Run requests over a trained model, and one request alone, remembering what it said."""
    known = {}

    def play(arrivals, cancels, **options):
        with LLM(loaded, cache="float32", backend="reference", **options) as llm:
            return Run(llm.engine, cancels).all(arrivals)

    def alone(one):
        if one not in known:
            run = play([(one, 0)], (), num_pages=64, page_size=4)
            known[one] = [join_outputs(run.outputs[0, index]) for index in range(one.parameters.n)]
        return known[one]

    return play, alone


@settings(max_examples=8, deadline=None)
@given(
    arrivals=st.lists(st.tuples(trained_requests, st.integers(0, 2)), min_size=2, max_size=4),
    cancels=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 4)), max_size=2),
    page_size=st.sampled_from([1, 4]),
    spare_pages=st.integers(0, 3),
    max_batch_tokens=st.integers(4, 20),
)
def test_over_a_trained_model(trained, arrivals, cancels, page_size, spare_pages, max_batch_tokens):
    play, alone = trained
    run = play(
        arrivals,
        cancels,
        num_pages=room(arrivals, page_size) + spare_pages,
        page_size=page_size,
        max_batch_tokens=max_batch_tokens,
    )
    run.compare(alone)
