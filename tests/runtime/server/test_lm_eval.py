"""lm-evaluation-harness' client ``local-completions`` against a server of the demo's model on this machine."""

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval.models.openai_completions")

from fp8kv.demo import MODELS
from fp8kv.runtime.llm import LLM
from fp8kv.runtime.sampling import SamplingParameters

MODEL = MODELS["tiny-minimax-m2"]
PAIRS = [
    ("Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:", " 7"),
    ("Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:", " He"),
    ("Question: Anna gives 2 books away.\nAnswer:", " Anna gives 2 books away.\n#### 2"),
]


@pytest.fixture(scope="module")
def tiny():
    options = {"cache": "fp8-unit", "backend": "reference", "device": "cpu", "dtype": "float32"}
    with LLM(MODEL, num_pages=64, **options) as llm:
        yield llm


@pytest.fixture
def expected(tiny):
    """What the engine says of the pairs, and behind their contexts, before the server has it."""
    scores = []
    for context, continuation in PAIRS:
        start = len(tiny.encode(context))
        (found,) = tiny.score([tiny.encode(context) + tiny.encode(continuation)])
        own = found[start - 1 :]
        scores.append((sum(one.logprob for one in own), all(one.is_greedy for one in own)))
    parameters = SamplingParameters(max_tokens=40, stop=("Question:", "\n\n"))
    texts = [one.text for one in tiny.generate([context for context, _ in PAIRS], parameters)]
    return scores, texts


@pytest.fixture(params=[1, 3], ids=["one by one", "in batches"])
def harness(request, expected, tiny, listening, monkeypatch):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with listening(tiny, model="tiny", api_key="k") as server:
        yield LocalCompletionsAPI(
            model="tiny",
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(MODEL),
            tokenizer_backend="huggingface",
            batch_size=request.param,
            max_retries=1,
        )


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_the_harness_reads_the_same_scores_and_texts(harness, expected):
    scores, texts = expected
    found = harness.loglikelihood(instances("loglikelihood", PAIRS))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in scores], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in scores]
    assert len({is_greedy for _, is_greedy in found}) == 2
    asked = [
        (context, {"until": ["Question:", "\n\n"], "max_gen_toks": 40, "do_sample": False})
        for context, _ in PAIRS
    ]
    assert harness.generate_until(instances("generate_until", asked)) == texts
