"""The engine: whatever happens around a request, it says what it says alone."""

import weakref

import pytest
import torch

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.requests import join_outputs

PAGE = 4
VOCABULARY = 259
EOS = 257


@pytest.fixture(scope="module")
def kit(fake_model, byte_tokenizer):
    return fake_model.EngineKit(byte_tokenizer)


def test_the_tokens_are_the_models_own(kit):
    engine, model = kit.make()
    engine.add(kit.request("a prompt", max_tokens=6, ignore_eos=True))
    (outputs,) = kit.drain(engine).values()

    tokens = list(b"a prompt")
    for _ in range(6):
        tokens.append(int(model._answer(tokens).argmax()))

    assert list(join_outputs(outputs).token_ids) == tokens[8:]
    assert [output.finish_reason for output in outputs] == [None] * 5 + ["length"]


def test_the_fuzz_has_what_it_needs_preemption_chunks_and_reuse(kit):
    engine, model = kit.make(num_pages=9, max_batch_tokens=7)
    for tail in "abc":
        engine.add(kit.request("x" * 13 + tail, max_tokens=12, ignore_eos=True))
    kit.drain(engine)
    status = engine.status
    assert status.num_preemptions > 0
    assert status.num_reused_tokens > 0
    assert any(batch.max_prefix_len and not batch.is_decode for batch in model.batches)
    assert status.num_generated_tokens == 36
    assert status.num_computed_tokens == sum(batch.num_tokens for batch in model.batches)


def test_outputs_come_one_token_at_a_time_in_order(kit):
    engine, _ = kit.make()
    ids = [engine.add(kit.request(text, ignore_eos=True)) for text in ("one", "another")]
    assert engine.step() == [], "nothing was computed before"
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
    (free,) = kit.alone(kit.request("stop", max_tokens=40, ignore_eos=True))
    stop = free.text[5:8]
    (found,) = kit.alone(kit.request("stop", max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert found.finish_reason == "stop"
    assert found.text == free.text[: free.text.index(stop)]
    assert found.token_ids == free.token_ids[: len(found.token_ids)]


def test_the_end_of_sequence_ends_the_text_and_is_no_part_of_it(kit):
    for start in "abcdefgh":
        (found,) = kit.alone(kit.request(start, max_tokens=200))
        if found.finish_reason == "stop":
            break
    assert found.token_ids[-1] == EOS
    assert EOS not in found.token_ids[:-1]
    assert found.text == kit.tokenizer.decode(found.token_ids[:-1])


def test_ignore_eos_goes_on_to_the_last_token(kit):
    for start in "abcdefgh":
        (found,) = kit.alone(kit.request(start, max_tokens=100, ignore_eos=True))
        assert (len(found.token_ids), found.finish_reason) == (100, "length")


def test_several_continuations_share_the_prompt(kit):
    engine, _ = kit.make()
    text = "a prompt of several pages"
    engine.add(kit.request(text, n=4, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True))
    outputs = kit.drain(engine)
    assert sorted(outputs) == [(0, index) for index in range(4)]
    texts = {join_outputs(steps).text for steps in outputs.values()}
    assert len(texts) == 4, "each has a seed of its own"
    shared = (len(text) - 1) // PAGE * PAGE
    assert engine.status.num_reused_tokens == 3 * shared


def test_without_a_seed_two_requests_differ_and_one_survives_its_preemption(kit):
    engine, _ = kit.make()
    for _ in range(2):
        engine.add(kit.request("dice", temperature=2.0, max_tokens=20, ignore_eos=True))
    first, second = kit.drain(engine).values()
    assert join_outputs(first).token_ids != join_outputs(second).token_ids


@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_are_the_models(kit, num_top):
    engine, model = kit.make()
    engine.add(kit.request("abc", max_tokens=4, logprobs=num_top, ignore_eos=True))
    (outputs,) = kit.drain(engine).values()
    tokens = list(b"abc")
    for entry in join_outputs(outputs).logprobs:
        expected = model._answer(tokens).log_softmax(-1)
        best = expected.topk(num_top)
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-5)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        tokens.append(entry.token_id)


def test_no_logprobs_unless_asked_for(kit):
    engine, _ = kit.make()
    engine.add(kit.request("abc", max_tokens=2))
    (outputs,) = kit.drain(engine).values()
    assert all(output.logprobs == () for output in outputs)


def test_the_last_token_may_take_the_last_place_of_the_cache_and_one_more_is_refused(kit):
    engine, _ = kit.make(num_pages=3)
    engine.add(kit.request("12345", max_tokens=8, ignore_eos=True))  # the last is not cached
    (outputs,) = kit.drain(engine).values()
    assert len(outputs) == 8
    with pytest.raises(
        RequestError,
        match=r"^a prompt of 5 tokens with max_tokens 9 can never fit .* 12 .*num_pages",
    ):
        engine.add(kit.request("12345", max_tokens=9))
    assert not engine.has_work


def test_what_can_never_run_is_refused_and_leaves_nothing(kit):
    engine, _ = kit.make(max_positions=31)
    with pytest.raises(RequestError, match="exceeds the model's 31 positions"):
        engine.add(kit.request("a prompt of twenty.."))
    assert not engine.has_work


def test_more_continuations_than_seats_are_refused(kit):
    engine, _ = kit.make(max_sequences=3)
    with pytest.raises(
        RequestError, match=r"^n is 4, and the engine continues 3 at one time: lower"
    ):
        engine.add(kit.request("a", n=4))
    engine.add(kit.request("a", n=3))
    assert len(kit.drain(engine)) == 3


def test_cancelling_frees_the_pages_and_says_whether_there_was_something(kit):
    engine, _ = kit.make()
    request_id = engine.add(kit.request("cancel me", n=3, ignore_eos=True))
    other = engine.add(kit.request("and not me", ignore_eos=True))
    engine.step()
    assert engine.cancel(request_id) is True
    assert engine.cancel(request_id) is False
    assert {key[0] for key in kit.drain(engine)} == {other}


def test_a_prompt_that_is_cancelled_half_way_leaves_no_half_page_to_find(kit):
    one = kit.request("a prompt of some pages")
    engine, _ = kit.make(max_batch_tokens=6)  # a page and a half
    request_id = engine.add(one)
    engine.step()
    engine.cancel(request_id)
    engine.add(one)
    (outputs,) = kit.drain(engine).values()
    assert [join_outputs(outputs)] == kit.alone(one)
    assert engine.status.num_reused_tokens == PAGE


def test_a_model_that_fails_loses_no_request(kit):
    one = kit.request("again", ignore_eos=True)
    (expected,) = kit.alone(one)
    engine, model = kit.make()
    engine.add(one)
    for _ in range(2):  # before anything was computed, and with a token that was not handed out
        model.fails = True
        with pytest.raises(RuntimeError, match="the model broke"):
            engine.step()
        model.fails = False
        engine._allocator.check()
        engine.step()
    (outputs,) = kit.drain(engine).values()
    assert len(outputs) == 11, "one came above"
    assert join_outputs(outputs).token_ids == expected.token_ids[1:]


def test_closing_drops_everything_and_takes_no_more(kit):
    engine, _ = kit.make(max_sequences=2)
    with engine:
        engine.add(kit.request("running"))
        engine.add(kit.request("waiting", n=2))
        engine.step()
        assert engine.status.num_waiting == 1
    kit.assert_clean(engine)
    assert engine.step() == []
    with pytest.raises(RequestError, match="closed"):
        engine.add(kit.request("late"))


def test_a_character_of_several_tokens_comes_whole(kit):
    engine, model = kit.make()
    letters = list("é€😀".encode())
    script = iter([*letters, EOS, EOS])  # the last for a pass in vain

    def answer(_tokens):
        logits = torch.zeros(VOCABULARY)
        logits[encoded(kit, next(script))] = 50.0
        return logits

    model._answer = answer
    engine.add(kit.request("utf", max_tokens=40))
    (outputs,) = kit.drain(engine).values()
    assert [output.text for output in outputs if output.text] == ["é", "€", "😀"]


def encoded(kit, byte):
    """The byte kit's id of a byte; special tokens are themselves."""
    if byte > 255:
        return byte
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return kit.tokenizer.convert_tokens_to_ids(bytes_to_unicode()[byte])


def test_a_stop_string_is_found_while_the_next_pass_runs_and_what_that_says_is_dropped(kit):
    (free,) = kit.alone(kit.request("stop", max_tokens=40, ignore_eos=True))
    stop = free.text[5:8]
    engine, model = kit.make()
    engine.add(kit.request("stop", max_tokens=40, ignore_eos=True, stop=(stop,)))
    while engine.has_work:
        outputs = engine.step()
    assert outputs[-1].finish_reason == "stop"
    length = len(free.text[: free.text.index(stop) + 3])
    assert len(model.batches) == length + 1, "one pass in vain"
    assert engine.status.num_generated_tokens == length
    kit.assert_clean(engine)
    assert engine.step() == []
    assert engine.status.num_generated_tokens == length
    kit.assert_clean(engine)


def test_no_pass_in_vain_follows_the_last_token(kit):
    engine, model = kit.make()
    engine.add(kit.request("a", max_tokens=7, ignore_eos=True))
    kit.drain(engine)
    assert len(model.batches) == 7


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_cancelling_with_a_pass_under_way_leaves_nothing(kit, steps):
    engine, _ = kit.make()
    request_id = engine.add(kit.request("cancel me", n=2, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    assert engine.cancel(request_id)
    assert not engine.has_work
    assert engine.step() == []
    kit.assert_clean(engine)
    generated = engine.status.num_generated_tokens
    # and the pages of it that are known hold what they should
    one = kit.request("cancel me, too", ignore_eos=True)
    engine.add(one)
    (outputs,) = kit.drain(engine).values()
    assert [join_outputs(outputs)] == kit.alone(one)
    assert engine.status.num_generated_tokens == generated + 12


def test_one_that_fails_ends_alone_and_its_pages_are_not_found_again(kit):
    engine, _ = kit.make()
    engine.add(kit.request("well and good", ignore_eos=True))
    engine.add(kit.request("bad! bad", ignore_eos=True))  # fails with the tenth token
    outputs = kit.drain(engine)
    good, bad = (join_outputs(steps) for steps in outputs.values())
    assert good.finish_reason == "length"
    assert bad.finish_reason == "error"
    assert len(bad.token_ids) == 2
    assert bad.error.startswith("the logits hold NaN or infinity: ")
    before = engine.status.num_reused_tokens
    engine.add(kit.request("bad! bad", ignore_eos=True))
    kit.drain(engine)
    assert engine.status.num_reused_tokens == before
    engine.add(kit.request("well and good", ignore_eos=True))
    kit.drain(engine)
    assert engine.status.num_reused_tokens == before + 12


def test_siblings_of_one_that_fails_have_their_own_end(kit):
    engine, _ = kit.make()
    engine.add(kit.request("bad!!", n=3, ignore_eos=True))
    outputs = kit.drain(engine)
    assert [steps[-1].finish_reason for steps in outputs.values()] == ["error"] * 3


def test_a_closed_engine_keeps_no_model(kit):
    engine, model = kit.make()
    engine.add(kit.request("a"))
    engine.step()
    known = weakref.ref(model)
    engine.close()
    engine.close()
    del model
    assert known() is None
