"""A checkpoint, generating: the embedded models through pages say what transformers says."""

import gc
import weakref

import pytest
import torch

from fp8kv.demo import MODELS, TEST_DATA, TRAIN_DATA
from fp8kv.recipes.errors import EvaluationError, Fp8kvError, RequestError, UnsupportedModelError
from fp8kv.runtime.evaluation.gsm8k import STOPS, build_prompts, load_problems, truncate_at_stop
from fp8kv.runtime.llm import LLM, load
from fp8kv.runtime.sampling import SamplingParameters


def make(name="tiny-minimax-m2", **options):
    settings = {"cache": "float32", "backend": "reference", "device": "cpu", "num_pages": 60}
    return LLM(MODELS.get(name, name) if isinstance(name, str) else name, **settings | options)


@pytest.fixture(scope="module", params=["tiny-minimax-m2", "tiny-deepseek-v3"])
def llm(request):
    with make(request.param) as llm:
        llm.name = request.param
        llm.loaded = request.getfixturevalue(
            {"tiny-minimax-m2": "minimax", "tiny-deepseek-v3": "deepseek"}[request.param]
        )
        yield llm


@pytest.fixture(scope="module")
def prompts():
    """Prompts of different lengths, with shots in common."""
    problems = load_problems(TEST_DATA)[:5]
    shots = load_problems(TRAIN_DATA)
    return [build_prompts([problem], shots, count % 3)[0] for count, problem in enumerate(problems)]


@pytest.fixture(autouse=True)
def everything_is_given_back(request):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert llm.engine.status.num_free_pages == llm.engine.status.num_pages
        assert not llm.engine.has_work
        llm.engine._allocator.check([])


def greedy(max_tokens=24, **more):
    return SamplingParameters(max_tokens=max_tokens, **more)


def test_greedy_texts_are_those_of_transformers(llm, prompts, greedy_texts):
    found = llm.generate(prompts, greedy())
    expected = greedy_texts(llm.loaded.model, llm.loaded.tokenizer, prompts, 24)
    assert [one.text for one in found] == expected
    assert {one.choices[0].finish_reason for one in found} <= {"stop", "length"}
    assert [one.prompt_token_ids for one in found] == [
        tuple(llm.tokenizer(prompt)["input_ids"]) for prompt in prompts
    ]


def test_answers_are_those_of_transformers_to_their_end(minimax, prompts, greedy_texts):
    with make() as llm:
        found = llm.generate(prompts, greedy(160, stop=STOPS))
        expected = greedy_texts(minimax.model, minimax.tokenizer, prompts, 160, STOPS)
        for completion, text in zip(found, expected, strict=True):
            assert completion.choices[0].finish_reason == "stop"
            assert completion.text == truncate_at_stop(text, STOPS)


def test_few_pages_and_small_chunks_change_nothing(llm, prompts):
    expected = [completion.text for completion in llm.generate(prompts, greedy(12))]
    longest = max(len(llm.encode(prompt)) for prompt in prompts)
    num_pages = -(-(longest + 12) // 16) + 1
    with make(llm.name, page_size=16, num_pages=num_pages, max_batch_tokens=101) as tight:
        # six at a time, where there is room for the longest and a little
        found = tight.generate(prompts * 2, greedy(12))
        assert tight.engine.status.num_reused_tokens > 0
        tight.engine._allocator.check([])
    assert [completion.text for completion in found] == expected * 2


def test_preemption_changes_nothing(llm, prompts):
    (expected,) = llm.generate(prompts[:1], greedy(40, ignore_eos=True))
    num_pages = -(-(len(expected.prompt_token_ids) + 40) // 16) + 1
    with make(llm.name, page_size=16, num_pages=num_pages) as tight:
        found = tight.generate(prompts[:1] * 2, greedy(40, ignore_eos=True))
        assert tight.engine.status.num_preemptions > 0
    assert [completion.text for completion in found] == [expected.text] * 2


REFUSED = {
    "gemma4_text": "share the KV cache",
    "kimi_linear": "linear attention",
    "llama4_text": "chunked attention",
    "minimax": "linear attention",
    "qwen3_5_moe_text": "linear attention",
    "qwen3_next": "linear attention",
}


def test_every_architecture_says_what_transformers_says_or_is_refused(
    architecture, tiny_checkpoint, load, greedy_texts
):
    path = tiny_checkpoint(architecture)
    # chunks of ten tokens, and room for one and a half of the three
    options = {"device": "cpu", "page_size": 4, "num_pages": 16, "max_batch_tokens": 10}
    if architecture in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[architecture]):
            LLM(path, cache="float32", **options)
        return
    loaded = load(path)
    texts = ["hello there", "a longer prompt than the other", "x"]
    expected = greedy_texts(loaded.model, loaded.tokenizer, texts, 30)
    with LLM(path, cache="float32", **options) as llm:
        found = llm.generate(texts, greedy(30))
        assert llm.engine.status.num_free_pages == 16
        llm.engine._allocator.check([])
    assert [completion.text for completion in found] == expected


@pytest.mark.parametrize("cache", ["bf16", "fp8", "fp8-unit", "emulate"])
def test_every_cache_generates(prompts, cache):
    with make(cache=cache) as llm:
        (completion,) = llm.generate(prompts[:1], greedy(8, ignore_eos=True))
        assert len(completion.choices[0].token_ids) == 8


def test_logprobs_of_a_text_are_those_of_transformers(llm, prompts):
    found = llm.logprobs(prompts[:3])
    for prompt, scores in zip(prompts, found, strict=False):
        token_ids = torch.tensor([llm.tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            logits = llm.loaded.model(token_ids).logits[0, :-1].float()
        expected = logits.log_softmax(-1).gather(1, token_ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), expected, atol=2e-4, rtol=1e-4)


def test_logprobs_in_chunks_are_the_same(llm, prompts):
    with make(llm.name, max_batch_tokens=19) as chunked:
        (found,) = chunked.logprobs(prompts[1:2])
    (expected,) = llm.logprobs(prompts[1:2])
    assert found == pytest.approx(expected, abs=2e-4)


def test_generated_logprobs_are_the_texts(llm, prompts):
    (completion,) = llm.generate(prompts[:1], greedy(6, logprobs=2, ignore_eos=True))
    (choice,) = completion.choices
    whole = completion.prompt_token_ids + choice.token_ids
    (scores,) = llm.logprobs([whole])
    assert [entry.logprob for entry in choice.logprobs] == pytest.approx(scores[-6:], abs=2e-4)
    for entry, token_id in zip(choice.logprobs, choice.token_ids, strict=True):
        assert entry.token_id == token_id
        assert entry.top[0] == (token_id, pytest.approx(entry.logprob, abs=1e-5)), "greedy"
        assert len(entry.top) == 2


def test_scores_say_which_tokens_are_greedy(llm, prompts):
    (completion,) = llm.generate(prompts[:1], greedy(6, ignore_eos=True))
    whole = completion.prompt_token_ids + completion.choices[0].token_ids
    (scores,) = llm.score([whole])
    assert [score.token_id for score in scores] == list(whole[1:])
    assert all(score.is_greedy for score in scores[-6:])
    assert not all(score.is_greedy for score in scores)


def test_teacher_forced_logits_are_those_of_transformers(llm, prompts):
    encoded = llm.encode_all(prompts[:3])
    sequences = [
        (token_ids[:-size], token_ids[-size:])
        for token_ids, size in zip(encoded, (1, 7, 30), strict=True)
    ]
    found = list(llm.teacher_forced(sequences))
    assert [number for number, _ in found] == [0, 1, 2]
    for (prompt, answer), (_, logits) in zip(sequences, found, strict=True):
        with torch.inference_mode():
            expected = llm.loaded.model(torch.tensor([[*prompt, *answer]])).logits[0]
        expected = expected[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits, expected.float(), atol=2e-3, rtol=1e-3)


def test_one_token_has_no_logprob(llm):
    assert llm.logprobs([[5]]) == [[]]


def test_streams_of_one_object_do_not_take_each_others_tokens(llm, prompts):
    expected = [completion.text for completion in llm.generate(prompts[:2], greedy())]
    first, second = (llm.stream(prompt, greedy()) for prompt in prompts[:2])
    texts = [next(first).text, next(second).text]
    texts[1] += "".join(output.text for output in second)
    texts[0] += "".join(output.text for output in first)
    assert texts == expected


def test_who_stops_listening_frees_the_pages(llm, prompts):
    stream = llm.stream(prompts[0], greedy(ignore_eos=True))
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work


def test_each_prompt_with_its_own_parameters(llm, prompts):
    found = llm.generate(
        prompts[:2], [greedy(3, ignore_eos=True), greedy(5, n=2, temperature=1.0, seed=1)]
    )
    assert [len(completion.choices) for completion in found] == [1, 2]
    assert len(found[0].choices[0].token_ids) == 3


def test_prompts_come_as_they_are_done(llm, prompts):
    counts = [9, 2, 5]
    parameters = [greedy(count, ignore_eos=True) for count in counts]
    found = list(llm.generate_iter(prompts[:3], parameters))
    assert [number for number, _ in found] == [1, 2, 0]
    assert [completion for _, completion in sorted(found, key=lambda pair: pair[0])] == (
        llm.generate(prompts[:3], parameters)
    )


def test_no_prompts_no_completions(llm):
    assert llm.generate([], greedy()) == []


@pytest.mark.parametrize(
    ("prompts", "parameters", "message"),
    [
        ("text", greedy(), "prompts is one text"),
        (["a", "b"], [greedy()], "2 prompts have 1 parameters"),
        (["fine", ""], greedy(), "prompt is empty"),
        (["fine", "far"], greedy(10**9), "a prompt of .* tokens with max_tokens 1000000000"),
        ([[1, 10**6]], greedy(), "token id 1000000"),
        ([[1, 2.5]], greedy(), r"a prompt is \[1, 2\.5\]: give a text or a list of token ids"),
        ([7], greedy(), "a prompt is 7: give a text"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(llm, prompts, parameters, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, parameters)


def test_a_text_that_cannot_be_scored_is_refused(llm):
    with pytest.raises(RequestError, match=r"can never fit|exceeds"):
        llm.logprobs([[5] * 5000])


def test_after_closing_the_model_generates_no_more():
    llm = make()
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        llm.generate(["a"], greedy())


def test_closed_is_closed():
    llm = make()
    llm.close()
    for call in (lambda: llm.score([[1, 2]]), lambda: llm.runner, llm.cache_counts):
        with pytest.raises(RequestError, match="closed"):
            call()


@pytest.fixture(scope="module")
def loaded():
    return load(MODELS["tiny-minimax-m2"], device="cpu")


def test_one_model_serves_one_llm_after_the_other(loaded):
    found = []
    for cache in ("float32", "fp8", "float32"):
        with make(loaded, cache=cache, device="auto") as llm:
            found.append(llm.logprobs([[40, 41, 42] * 5])[0])
    assert found[0] == found[2] != found[1]


def test_an_llm_that_cannot_be_made_leaves_the_model_free(loaded):
    with pytest.raises(Fp8kvError, match="48"):
        make(loaded, page_size=48, device="auto")
    with make(loaded, device="auto"), pytest.raises(RequestError, match="in use: close the LLM"):
        make(loaded, device="auto")
    make(loaded, device="auto").close()


def test_closing_lets_go_of_the_cache_though_the_llm_is_kept(loaded):
    llm = make(loaded, device="auto", count_clipped=True)
    llm.generate([[40, 41]], greedy(3))
    pages = weakref.ref(next(iter(llm.runner._runner.cache.layers.values())).k)
    gc.collect()
    gc.disable()
    try:
        llm.close()
        assert pages() is None
    finally:
        gc.enable()
    assert llm.engine.status.num_running == 0


def test_settings_of_loading_are_refused_for_what_is_loaded(loaded):
    with pytest.raises(RequestError, match=r"loaded already: give dtype, .* to load\(\)"):
        LLM(loaded, dtype="float32")


def test_clipped_values_are_counted_where_that_is_asked_for(loaded):
    with make(loaded, device="auto", cache="fp8", count_clipped=True) as llm:
        llm.generate([[40, 41, 42]], greedy(2, ignore_eos=True))
        counts = llm.cache_counts()
        assert len(counts) == loaded.model.config.num_hidden_layers
        assert all(layer.k.num_values > 0 for layer in counts.values())
    with make(loaded, device="auto") as llm, pytest.raises(RequestError, match="count_clipped"):
        llm.cache_counts()


def test_logits_that_are_no_numbers_end_the_prompt_by_its_number(loaded):
    weight = loaded.model.get_input_embeddings().weight
    row = weight[77].clone()
    prompts = [[40, 41, 42], [40, 77, 42], [40, 41, 43]]
    try:
        weight[77] = torch.nan
        with make(loaded, device="auto", page_size=1) as llm:
            with pytest.raises(EvaluationError, match=r"^prompt 1 of 3: the logits hold NaN"):
                llm.generate(prompts, greedy(4))
            assert not llm.engine.has_work
            llm.engine._allocator.check([])
            assert len(llm.generate(prompts[::2], greedy(4))) == 2
    finally:
        weight[77] = row


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError, match="max_model_length"):
        make(max_model_length=8192)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": "int3"}, RequestError, "dtype is 'int3'.*bfloat16"),
        ({"memory_fraction": 0.5}, RequestError, "num_pages and memory_fraction"),
        ({"num_pages": None, "memory_fraction": 2}, RequestError, "memory_fraction is 2"),
        ({"num_pages": 0}, RequestError, "num_pages is 0"),
        ({"num_pages": "60"}, RequestError, "num_pages is '60'"),
        ({"prefill": "fp16"}, RequestError, "prefill is 'fp16'.*fp8, bf16"),
        ({"cuda_graphs": 1}, RequestError, "cuda_graphs is 1"),
        ({"count_clipped": "no"}, RequestError, "count_clipped is 'no'"),
        ({"max_sequences": 2.5}, RequestError, "max_sequences is 2.5"),
        ({"max_batch_tokens": 0}, RequestError, "max_batch_tokens is 0"),
        ({"backend": "cuda"}, RequestError, "backend is 'cuda'.*reference, triton"),
        ({"cache": "fp4"}, Fp8kvError, "fp4"),
        ({"page_size": 48}, Fp8kvError, "48"),
    ],
)
def test_wrong_settings_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        make(**options)


def test_on_a_cpu_the_cache_is_as_large_as_all_seats_need():
    with make(num_pages=None, max_sequences=2) as llm:
        assert llm.engine.status.num_pages == 2 * 4096 // 64
