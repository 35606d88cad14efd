"""Several askers of one engine."""

import pytest

from fp8kv.recipes.errors import EvaluationError, RequestError
from fp8kv.runtime.requests import join_outputs
from fp8kv.runtime.streams import Streams


@pytest.fixture
def kit(fake_model, byte_tokenizer):
    return fake_model.EngineKit(byte_tokenizer)


def test_each_gets_its_own_outputs_whoever_steps(kit):
    engine, _ = kit.make()
    streams = Streams(engine)
    first, second = (
        streams.run([kit.request(text, ignore_eos=True), kit.request(text + "y", n=2, seed=1)])
        for text in "ab"
    )
    outputs = {0: [next(first)], 1: [next(second)]}
    outputs[0] += first
    outputs[1] += second
    for stream, text in enumerate("ab"):
        found = [output for number, output in outputs[stream] if number == 0]
        assert [join_outputs(found)] == kit.alone(kit.request(text, ignore_eos=True))
        assert {output.index for number, output in outputs[stream] if number == 1} == {0, 1}
    kit.assert_clean(engine)


def test_a_failure_names_the_prompt_and_cancels_the_others_of_the_same_asker(kit):
    engine, _ = kit.make()
    streams = Streams(engine)
    other = streams.run([kit.request("abc", ignore_eos=True)])
    next(other)
    with pytest.raises(EvaluationError, match=r"^prompt 1 of 3: the logits hold NaN"):
        list(streams.run([kit.request(text, ignore_eos=True) for text in ("x", "y!y", "z")]))
    assert len(list(other)) == 11
    kit.assert_clean(engine)


def test_one_that_is_refused_leaves_none_of_the_others(kit):
    engine, _ = kit.make(num_pages=4)
    with pytest.raises(RequestError, match="can never fit"):
        list(Streams(engine).run([kit.request("fits"), kit.request("far", max_tokens=99)]))
    assert not engine.has_work
