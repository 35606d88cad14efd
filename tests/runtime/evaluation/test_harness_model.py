"""The engine as a model of lm-evaluation-harness, beside the harness' own model of the same checkpoint."""

import sys
from types import SimpleNamespace

import pytest

from fp8kv.demo import MODELS
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.harness_model import harness_model
from fp8kv.runtime.llm import LLM

try:
    import lm_eval.models.huggingface as harness_hf
    from lm_eval.api.instance import Instance
except ImportError:
    harness_hf = None

needs_harness = pytest.mark.skipif(harness_hf is None, reason="needs lm-evaluation-harness")

QUESTION = "Question: Tom has 3 apples and buys 4 more. How many apples has he now?\nAnswer:"
SHOTS = f"{QUESTION} He has 3 + 4 = 7 apples.\n#### 7\n\n" * 3


class Short:
    """A model with fewer positions than it has."""

    def __init__(self, llm, max_positions):
        self._llm = llm
        self.max_positions = max_positions

    def __getattr__(self, name):
        return getattr(self._llm, name)


@pytest.fixture(scope="module")
def llm():
    with LLM(
        MODELS["tiny-minimax-m2"], cache="float32", backend="reference", device="cpu", num_pages=40
    ) as llm:
        yield llm


@pytest.fixture(scope="module", params=["trained", "short"])
def pair(request, llm, minimax, tiny_checkpoint, load):
    """Our model and the harness' own, of a trained checkpoint and of one whose positions are few."""
    if request.param == "trained":
        yield harness_model(llm), hf_model(minimax)
    else:
        path = tiny_checkpoint("llama")
        with LLM(path, cache="float32", backend="reference", device="cpu", num_pages=40) as short:
            assert short.max_positions == 256
            yield harness_model(short), hf_model(load(path))


def hf_model(loaded):
    return harness_hf.HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=own, idx=number)
        for number, own in enumerate(arguments)
    ]


@needs_harness
def test_continuations_are_as_likely_as_in_the_harness(pair):
    ours, theirs = pair
    asked = requests(
        "loglikelihood",
        (QUESTION, " 7"),
        (QUESTION, " 8 apples"),
        (QUESTION + " ", "7"),
        (SHOTS + QUESTION, " He has 3 + 4 = 7 apples.\n#### 7"),
        ("", "Question: Tom"),
        (QUESTION, " He has 3 + 4 ="),
    )
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]


@needs_harness
def test_what_greedy_decoding_says_is_called_greedy(llm):
    ours = harness_model(llm)
    (text,) = ours.generate_until(requests("generate_until", (QUESTION, {"max_gen_toks": 8})))
    (first,), (second,) = (
        ours.loglikelihood(requests("loglikelihood", (QUESTION, continuation)))
        for continuation in (text, text[:-1] + "%")
    )
    assert first[1]
    assert not second[1]


@needs_harness
def test_whole_texts_are_as_likely_as_in_the_harness(pair):
    ours, theirs = pair
    asked = requests("loglikelihood_rolling", (SHOTS,), (QUESTION,), ("Tom",), ("",))
    found, expected = ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[-1] == 0


@needs_harness
def test_texts_are_those_of_the_harness(pair):
    ours, theirs = pair
    asked = requests(
        "generate_until",
        (QUESTION, {"max_gen_toks": 24, "until": ["\n\n"]}),
        (QUESTION, {"max_gen_toks": 24, "until": [" "], "do_sample": False}),
        (QUESTION, {"max_gen_toks": 3, "until": "###", "temperature": 0.0}),
        (SHOTS + QUESTION, {"max_gen_toks": 24, "until": ["Question:", "</s>"]}),
    )
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert len(set(found)) > 2


@needs_harness
def test_sampling_is_repeatable_and_does_what_it_is_asked_for(llm):
    ours = harness_model(llm)
    settings = {
        "max_gen_toks": 12,
        "do_sample": True,
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 50,
    }
    asked = requests("generate_until", *[(QUESTION, settings)] * 3)
    found = ours.generate_until(asked)
    assert found == ours.generate_until(asked)
    assert len(set(found)) == 3
    greedy = ours.generate_until(requests("generate_until", (QUESTION, {"max_gen_toks": 12})))
    cold = settings | {"top_k": 1}
    assert ours.generate_until(requests("generate_until", (QUESTION, cold))) == greedy


@needs_harness
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 4, "num_beams": 3}, "asks for num_beams in generation, which the engine"),
        ({"max_gen_toks": 48}, "asks for 48 new tokens, and the model has 48 positions for them"),
        ({}, "asks for 256 new tokens"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(llm, settings, message):
    ours = harness_model(Short(llm, 48))
    with pytest.raises(EvaluationError, match=message):
        ours.generate_until(requests("generate_until", (QUESTION, settings)))


@needs_harness
def test_a_continuation_beyond_the_model_is_refused(llm):
    ours = harness_model(Short(llm, 48))
    with pytest.raises(EvaluationError, match=r"of \d+ tokens exceeds the model's 48 positions"):
        ours.loglikelihood(requests("loglikelihood", (QUESTION, SHOTS)))


class Tokenizer:
    """Puts a first token before a text, one id a letter, unless told not to."""

    bos_token_id, eos_token_id = 1, 2
    name_or_path = "some/name"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + list(map(ord, text))}

    def decode(self, ids):
        return {1: "<s>", 2: "</s>"}[ids[0]]

    def apply_chat_template(self, messages, **options):
        return f"{messages} {sorted(options.items())}"


@needs_harness
@pytest.mark.parametrize(
    ("text", "special", "expected"),
    [
        ("ab", None, [1, 97, 98]),
        ("ab", False, [97, 98]),
        ("<s>ab", None, [60, 115, 62, 97, 98]),
        ("<s>a", True, [1, 60, 115, 62, 97]),
    ],
)
def test_a_first_token_stands_before_a_text_once(text, special, expected):
    model = harness_model(SimpleNamespace(tokenizer=Tokenizer(), max_positions=None))
    assert model.tok_encode(text, add_special_tokens=special) == expected
    assert (model.prefix_token_id, model.eot_token_id, model.max_length) == (1, 2, 2048)


@needs_harness
def test_the_chat_template_is_the_tokenizers(llm):
    model = harness_model(SimpleNamespace(tokenizer=Tokenizer(), max_positions=None))
    assert model.apply_chat_template([{"role": "user"}]) == (
        "[{'role': 'user'}] [('add_generation_prompt', True), ('continue_final_message', False), "
        "('tokenize', False)]"
    )
    assert "('add_generation_prompt', False), ('continue_final_message', True)" in (
        model.apply_chat_template([], add_generation_prompt=False)
    )
    assert model.tokenizer_name == "some__name"


@needs_harness
def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = SimpleNamespace(eos_token_id=None)
    with pytest.raises(EvaluationError, match=r"names no end of sequence \(eos_token\)"):
        harness_model(SimpleNamespace(tokenizer=tokenizer, max_positions=None))


def test_without_the_harness_the_remedy_is_named(monkeypatch):
    for name in [*sys.modules]:
        if name.split(".")[0] == "lm_eval":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r'is not installed: pip install "fp8kv\[eval\]"'):
        harness_model(None)
