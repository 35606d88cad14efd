"""What it changes whether new tokens are attended to as the FP8 cache holds them or as the model computed them.

E4M3 keeps three bits behind the leading one: a stored K or V is off by at most 1/16 of itself (below the smallest normal
number by 2**-10 of the scale), some 2.6 % as a root mean square, in no direction of its own. In one attention call the
errors of the values enter as they are, and average out over the tokens that are seen; those of K move a score by a sum
of ``dim`` products, and average out likewise. So a call is off by a few percent of its output, and by nothing more than
follows from 1/16 everywhere. What that does to logits is as much as the FP8 cache does to them at every later step.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

from fp8kv.calibrate.modeling.tap import find_attention_modules, tap
from fp8kv.demo import TEST_DATA, TRAIN_DATA
from fp8kv.runtime.backends import choose_backend
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.cache_scales import CacheScales
from fp8kv.runtime.evaluation.gsm8k import build_prompts, load_problems
from fp8kv.runtime.model_runner import ModelRunner
from fp8kv.runtime.paged_attention import PagedLayer
from fp8kv.runtime.paged_cache import build_cache, measure_dims

PAGE_SIZE, PAGES = 16, 60
ON_GPU = pytest.mark.gpu


@pytest.fixture(scope="module")
def prompts(minimax):
    """Token ids of two prompts, of one and of two shots; both models know the same tokens."""
    problems, shots = load_problems(TEST_DATA)[:2], load_problems(TRAIN_DATA)
    texts = [build_prompts([problem], shots, 1 + n)[0] for n, problem in enumerate(problems)]
    return [minimax.tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(
    scope="module",
    params=[
        ("minimax", "reference"),
        ("deepseek", "reference"),
        pytest.param(("minimax", "triton"), marks=ON_GPU),
        pytest.param(("deepseek", "triton"), marks=ON_GPU),
    ],
    ids="-".join,
)
def case(request, prompts):
    """A model on its device with the scales of its largest K and V, and its own logits."""
    name, backend = request.param
    model, device = request.getfixturevalue(name).model, "cpu"
    if backend == "triton":
        device = "cuda"
        model = copy.deepcopy(model).to(device, torch.bfloat16)
    modules = find_attention_modules(model)
    largest = {layer: torch.zeros(2) for layer in modules}

    def note(write):
        found = torch.stack([write.keys.abs().max(), write.values.abs().max()]).float().cpu()
        layer = write.attention.name
        # an MLA row has one scale
        found = found.max().expand(2) if write.attention.attention == "mla" else found
        largest[layer] = largest[layer].maximum(found)

    with tap(modules, note), torch.no_grad():
        rows = [torch.tensor([ids], device=device) for ids in prompts]
        logits = [model(input_ids=row, use_cache=False).logits[0].float() for row in rows]
    layers = {layer: tuple((pair / 448).split(1)) for layer, pair in largest.items()}
    return SimpleNamespace(
        backend=choose_backend(backend, device),
        device=device,
        model=model,
        modules=modules,
        scales=CacheScales("e4m3fn", layers),
        logits=torch.cat(logits),
    )


def run(case, prompts, prefill, monkeypatch, mode="fp8"):
    """Return the output of every attention call, and the logits of every token of the prompts, computed at once."""
    cache = build_cache(
        case.modules, measure_dims(case.model, case.modules), mode=mode, num_pages=PAGES,
        page_size=PAGE_SIZE, device=case.device, scales=case.scales,
    )  # fmt: skip
    pages, sequences, outputs, attend = iter(range(PAGES)), [], [], PagedLayer.attend
    for ids in prompts:
        own = [next(pages) for _ in range(-(-len(ids) // PAGE_SIZE))]
        sequences.append((ids, 0, own))

    def keep(self, *arguments):
        outputs.append(attend(self, *arguments))
        return outputs[-1]

    monkeypatch.setattr(PagedLayer, "attend", keep)
    with ModelRunner(case.model, cache, case.backend, prefill=prefill) as runner:
        batch = make_batch(sequences, PAGE_SIZE, case.device)
        rows = torch.arange(batch.num_tokens, device=case.device)
        logits = runner.logits_at(batch, rows).float()
    monkeypatch.undo()
    return outputs, logits


def divergence(found, expected):
    """Return the Kullback-Leibler divergence of each token's distribution, [tokens]."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_an_attention_call_differs_by_the_rounding_of_what_it_reads(case, prompts, monkeypatch):
    quantised, _ = run(case, prompts, "fp8", monkeypatch)
    computed, _ = run(case, prompts, "bf16", monkeypatch)
    # the first call of both has the same input
    found, expected = quantised[0].float(), computed[0].float()
    difference = ((found - expected).norm() / expected.norm()).item()
    # measured: 2.9 % (MiniMax) and 1.7 % (DeepSeek)
    assert 0.005 < difference < 0.05


def test_logits_differ_as_little_as_by_an_fp8_cache(case, prompts, monkeypatch):
    _, quantised = run(case, prompts, "fp8", monkeypatch)
    _, computed = run(case, prompts, "bf16", monkeypatch)
    found = divergence(quantised, computed)
    # measured: 8e-5 (MiniMax) and 7e-5 (DeepSeek) on average
    assert 1e-6 < found.mean() < 3e-4
    same = (quantised.argmax(-1) == computed.argmax(-1)).float().mean()
    assert same > 0.98


def test_without_a_prefix_the_plain_path_is_the_unmodified_model(case, prompts, monkeypatch):
    _, found = run(case, prompts, "bf16", monkeypatch)
    exact = case.backend.name == "reference"
    # the model's own attention rounds to bfloat16 in other places
    assert divergence(found, case.logits).mean() < (1e-7 if exact else 1e-4)


def test_the_first_layer_caches_the_same_on_both_paths(case, prompts):
    codes = []
    for path in ("fp8", "bf16"):
        cache = build_cache(
            case.modules, measure_dims(case.model, case.modules), mode="fp8", num_pages=PAGES,
            page_size=PAGE_SIZE, device=case.device, scales=case.scales,
        )  # fmt: skip
        with ModelRunner(case.model, cache, case.backend, prefill=path) as runner:
            pages = list(range(PAGES))
            runner.forward(make_batch([(prompts[0], 0, pages)], PAGE_SIZE, case.device))
        written = cache.layers[next(iter(case.modules))].k.flatten(0, 1)[: len(prompts[0])]
        codes.append(written.float())
    if case.backend.name == "reference":
        assert torch.equal(*codes)
    # a backend that rotates rounds K once, the model in bfloat16 rounds both products, too: the neighbouring code, or
    # what is left of two large products that cancel
    largest = codes[1].abs().amax(-1, keepdim=True)
    assert ((codes[0] - codes[1]).abs() <= codes[1].abs() / 7 + largest * 2**-6).all()
    assert (codes[0] != codes[1]).float().mean() < 0.05
