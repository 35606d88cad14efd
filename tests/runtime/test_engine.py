"""The engine: whatever happens around a request, it says what it says alone."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.engine import Engine
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.requests import Request, join_outputs
from fp8kv.runtime.sampling import SamplingParameters

PAGE = 4


@pytest.fixture(scope="module")
def kit(fake_model, byte_tokenizer):
    """What an engine is made of."""
    return SimpleNamespace(fake=fake_model, tokenizer=byte_tokenizer)


def make(kit, num_pages=200, page_size=PAGE, **limits):
    """An engine over the fake model."""
    model = kit.fake.FakeModel(num_pages, page_size)
    engine = Engine(
        model,
        PageAllocator(num_pages, page_size),
        kit.tokenizer,
        EngineLimits(kit.fake.VOCABULARY, **{"max_positions": None} | limits),
        eos_token_ids=[kit.fake.EOS],
        device="cpu",
    )
    return engine, model


def request(text, **parameters):
    return Request(tuple(text.encode()), SamplingParameters(**{"max_tokens": 12} | parameters))


def drain(engine, sink=None):
    """Step to the end; return the outputs by request and continuation."""
    outputs = defaultdict(list) if sink is None else sink
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id, output.index].append(output)
    assert_clean(engine)
    return outputs


def assert_clean(engine):
    status = engine.status
    assert (status.num_waiting, status.num_running) == (0, 0)
    assert status.num_free_pages == status.num_pages
    engine._allocator.check()


def alone(kit, one):
    """What each continuation of a request says when nothing else is there and each runs by itself."""
    choices = []
    for index in range(one.parameters.n):
        engine, _ = make(kit)
        seed = None if one.parameters.seed is None else one.parameters.seed + index
        engine.add(replace(one, parameters=replace(one.parameters, n=1, seed=seed)))
        (outputs,) = drain(engine).values()
        choices.append(join_outputs(outputs))
    return choices


def test_the_tokens_are_the_models_own(kit):
    engine, model = make(kit)
    engine.add(request("a prompt", max_tokens=6, ignore_eos=True))
    (outputs,) = drain(engine).values()

    tokens = list(b"a prompt")
    for _ in range(6):
        tokens.append(int(model._answer(torch.tensor(tokens)).argmax()))

    assert list(join_outputs(outputs).token_ids) == tokens[8:]
    assert [output.finish_reason for output in outputs] == [None] * 5 + ["length"]


requests = st.builds(
    request,
    # few letters, so that prompts have prefixes in common
    st.text("xy", min_size=1, max_size=24),
    max_tokens=st.integers(1, 14),
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 9),
    stop=st.sampled_from([(), ("ab",), ("c", "dda")]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(requests, st.integers(0, 3)), min_size=1, max_size=8),
    cancels=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), max_size=4),
    page_size=st.sampled_from([1, 2, 4, 8]),
    spare_pages=st.integers(0, 12),
    max_batch_tokens=st.integers(1, 40),
    max_sequences=st.integers(3, 8),
)
def test_whatever_arrives_is_cancelled_or_preempted_everybody_says_what_they_say_alone(
    kit, arrivals, cancels, page_size, spare_pages, max_batch_tokens, max_sequences
):
    longest = max(len(one.prompt_token_ids) + one.parameters.max_tokens - 1 for one, _ in arrivals)
    engine, _ = make(
        kit,
        num_pages=-(-longest // page_size) + spare_pages,  # the least that may be
        page_size=page_size,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )
    added, cancelled = [], set()
    outputs = defaultdict(list)
    step = 0

    def run_step():
        nonlocal step
        for at, victim in cancels:
            if at == step and victim < len(added) and engine.cancel(victim):
                cancelled.add(victim)
        for output in engine.step():
            assert output.request_id not in cancelled
            outputs[output.request_id, output.index].append(output)
        engine._allocator.check()
        step += 1

    for one, pause in arrivals:
        added.append(one)
        assert engine.add(one) == len(added) - 1
        for _ in range(pause):
            run_step()
    while engine.has_work:
        run_step()
        assert step < 2000, "everybody ends"

    assert_clean(engine)
    for request_id, one in enumerate(added):
        for index, expected in enumerate(alone(kit, one)):
            steps = outputs[request_id, index]
            if request_id in cancelled and not (steps and steps[-1].finish_reason):
                found = tuple(token for output in steps for token in output.token_ids)
                assert found == expected.token_ids[: len(found)]
                assert expected.text.startswith("".join(output.text for output in steps))
            else:
                assert join_outputs(steps) == expected


def test_the_fuzz_has_what_it_needs_preemption_chunks_and_reuse(kit):
    engine, model = make(kit, num_pages=9, max_batch_tokens=7)
    for tail in "abc":
        engine.add(request("x" * 13 + tail, max_tokens=12, ignore_eos=True))
    drain(engine)
    status = engine.status
    assert status.num_preemptions > 0
    assert status.num_reused_tokens > 0
    assert any(batch.max_prefix_len and not batch.is_decode for batch in model.batches)
    assert status.num_generated_tokens == 36
    assert status.num_computed_tokens == sum(batch.num_tokens for batch in model.batches)


def test_outputs_come_one_token_at_a_time_in_order(kit):
    engine, _ = make(kit)
    ids = [engine.add(request(text, ignore_eos=True)) for text in ("one", "another")]
    seen = []
    for step in range(12):
        outputs = engine.step()
        assert [output.request_id for output in outputs] == ids
        assert all(len(output.token_ids) == 1 for output in outputs)
        assert all((output.finish_reason == "length") == (step == 11) for output in outputs)
        seen += outputs
    assert engine.step() == []
    assert not engine.has_work
    text = "".join(output.text for output in seen if output.request_id == ids[0])
    token_ids = [output.token_ids[0] for output in seen if output.request_id == ids[0]]
    assert text == kit.tokenizer.decode(token_ids, skip_special_tokens=True)


def test_a_stop_string_ends_the_text_before_it(kit):
    (free,) = alone(kit, request("stop", max_tokens=40, ignore_eos=True))
    stop = free.text[5:8]
    (found,) = alone(kit, request("stop", max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert found.finish_reason == "stop"
    assert found.text == free.text[: free.text.index(stop)]
    assert found.token_ids == free.token_ids[: len(found.token_ids)]


def test_the_end_of_sequence_ends_the_text_and_is_no_part_of_it(kit):
    for start in "abcdefgh":
        (found,) = alone(kit, request(start, max_tokens=200))
        if found.finish_reason == "stop":
            break
    assert found.token_ids[-1] == kit.fake.EOS
    assert kit.fake.EOS not in found.token_ids[:-1]
    assert found.text == kit.tokenizer.decode(found.token_ids[:-1])


def test_ignore_eos_goes_on_to_the_last_token(kit):
    for start in "abcdefgh":
        (found,) = alone(kit, request(start, max_tokens=100, ignore_eos=True))
        assert (len(found.token_ids), found.finish_reason) == (100, "length")


def test_several_continuations_share_the_prompt(kit):
    engine, _ = make(kit)
    text = "a prompt of several pages"
    engine.add(request(text, n=4, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True))
    outputs = drain(engine)
    assert sorted(outputs) == [(0, index) for index in range(4)]
    texts = {join_outputs(steps).text for steps in outputs.values()}
    assert len(texts) == 4, "each has a seed of its own"
    shared = (len(text) - 1) // PAGE * PAGE
    assert engine.status.num_reused_tokens == 3 * shared


def test_without_a_seed_two_requests_differ_and_one_survives_its_preemption(kit):
    engine, _ = make(kit)
    for _ in range(2):
        engine.add(request("dice", temperature=2.0, max_tokens=20, ignore_eos=True))
    first, second = drain(engine).values()
    assert join_outputs(first).token_ids != join_outputs(second).token_ids


@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_are_the_models(kit, num_top):
    engine, model = make(kit)
    engine.add(request("abc", max_tokens=4, logprobs=num_top, ignore_eos=True))
    (outputs,) = drain(engine).values()
    tokens = list(b"abc")
    for entry in join_outputs(outputs).logprobs:
        expected = model._answer(torch.tensor(tokens)).log_softmax(-1)
        best = expected.topk(num_top)
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        tokens.append(entry.token_id)


def test_no_logprobs_unless_asked_for(kit):
    engine, _ = make(kit)
    engine.add(request("abc", max_tokens=2))
    (outputs,) = drain(engine).values()
    assert all(output.logprobs == () for output in outputs)


def test_the_last_token_may_take_the_last_place_of_the_cache_and_one_more_is_refused(kit):
    engine, _ = make(kit, num_pages=3)
    engine.add(request("12345", max_tokens=8, ignore_eos=True))  # the last is not cached
    (outputs,) = drain(engine).values()
    assert len(outputs) == 8
    with pytest.raises(
        RequestError,
        match=r"^a prompt of 5 tokens with max_tokens 9 can never fit .* 12 .*num_pages",
    ):
        engine.add(request("12345", max_tokens=9))
    assert not engine.has_work


def test_what_can_never_run_is_refused_and_leaves_nothing(kit):
    engine, _ = make(kit, max_positions=31)
    with pytest.raises(RequestError, match="exceeds the model's 31 positions"):
        engine.add(request("a prompt of twenty.."))
    assert not engine.has_work


def test_more_continuations_than_seats_are_refused(kit):
    engine, _ = make(kit, max_sequences=3)
    with pytest.raises(
        RequestError, match=r"^n is 4, and the engine continues 3 at one time: lower"
    ):
        engine.add(request("a", n=4))
    engine.add(request("a", n=3))
    assert len(drain(engine)) == 3


def test_cancelling_frees_the_pages_and_says_whether_there_was_something(kit):
    engine, _ = make(kit)
    request_id = engine.add(request("cancel me", n=3, ignore_eos=True))
    other = engine.add(request("and not me", ignore_eos=True))
    engine.step()
    assert engine.cancel(request_id) is True
    assert engine.cancel(request_id) is False
    assert {key[0] for key in drain(engine)} == {other}


def test_a_prompt_that_is_cancelled_half_way_leaves_no_half_page_to_find(kit):
    one = request("a prompt of some pages")
    engine, _ = make(kit, max_batch_tokens=6)  # a page and a half
    request_id = engine.add(one)
    engine.step()
    engine.cancel(request_id)
    engine.add(one)
    (outputs,) = drain(engine).values()
    assert [join_outputs(outputs)] == alone(kit, one)
    assert engine.status.num_reused_tokens == PAGE


def test_a_model_that_fails_loses_no_request(kit):
    one = request("again", ignore_eos=True)
    (expected,) = alone(kit, one)
    engine, model = make(kit)
    engine.add(one)
    engine.step()
    model.fails = True
    with pytest.raises(RuntimeError, match="the model broke"):
        engine.step()
    model.fails = False
    (outputs,) = drain(engine).values()
    assert join_outputs(outputs).token_ids == expected.token_ids[1:]


def test_closing_drops_everything_and_takes_no_more(kit):
    engine, _ = make(kit, max_sequences=2)
    with engine:
        engine.add(request("running"))
        engine.add(request("waiting", n=2))
        engine.step()
        assert engine.status.num_waiting == 1
    assert_clean(engine)
    assert engine.step() == []
    with pytest.raises(RequestError, match="closed"):
        engine.add(request("late"))


def test_a_character_of_several_tokens_comes_whole(kit):
    engine, model = make(kit)
    letters = list("é€😀".encode())
    script = iter([*letters, kit.fake.EOS])

    def answer(_tokens):
        logits = torch.zeros(kit.fake.VOCABULARY)
        logits[encoded(kit, next(script))] = 50.0
        return logits

    model._answer = answer
    engine.add(request("utf", max_tokens=40))
    (outputs,) = drain(engine).values()
    assert [output.text for output in outputs if output.text] == ["é", "€", "😀"]


def encoded(kit, byte):
    """The byte kit's id of a byte; special tokens are themselves."""
    if byte > 255:
        return byte
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return kit.tokenizer.convert_tokens_to_ids(bytes_to_unicode()[byte])
