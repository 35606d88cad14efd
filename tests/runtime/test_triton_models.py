"""The embedded models by kernels, from an FP8 cache: the logits of the reference backend, and CUDA graphs that replay."""

import dataclasses
import json
from importlib import resources

import pytest
import torch

from fp8kv.calibrate.modeling.tap import find_attention_modules
from fp8kv.runtime.backends import choose_backend
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.loading import load
from fp8kv.runtime.model_runner import ModelRunner
from fp8kv.runtime.paged_cache import build_cache, measure_dims

pytestmark = pytest.mark.gpu

PAGE_SIZE = 16
# pages of three sequences, in no order
PAGES = (list(range(0, 24, 2)), list(range(1, 25, 2)), list(range(40, 24, -1)))
LENGTHS = (150, 40, 190)
# each forward's new tokens: prompts, one of them long; prefill behind a prefix beside decode; decode
STEPS = ((148, 20, 100), (1, 18, 88), (1, 1, 1), (0, 1, 1))


@pytest.fixture(scope="module", params=["minimax", "deepseek"])
def model(request):
    # loaded for the GPU: a model for the CPU takes its experts one by one, which no graph can record
    path = request.getfixturevalue(request.param).path
    return load(path, device="cuda", dtype="bfloat16")


def make_runner(loaded, backend, mode="fp8-unit"):
    model = loaded.model
    modules = find_attention_modules(model)
    cache = build_cache(
        modules, measure_dims(model, modules), mode=mode, num_pages=48, page_size=PAGE_SIZE,
        device="cuda", scales=None,
    )  # fmt: skip
    return ModelRunner(model, cache, choose_backend(backend, "cuda"))


def batches(tokenizer):
    """Give each forward's batch of texts that the models know; sequences that decode stand first."""
    lines = (resources.files("fp8kv.demo") / "data" / "gsm-synth-test.jsonl").read_text()
    problems = [json.loads(line) for line in lines.splitlines()]
    # whole problems, one after another: on random tokens the routers' choices hang by a rounding
    solved = [f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in problems]
    texts = [
        tokenizer("".join(solved[first : first + 4]))["input_ids"][:length]
        for first, length in zip((0, 10, 20), LENGTHS, strict=True)
    ]
    done = [0] * len(LENGTHS)
    for step in STEPS:
        sequences = []
        for number, new in sorted(enumerate(step), key=lambda pair: pair[1] > 1):
            if new:
                ids = texts[number][done[number] : done[number] + new]
                sequences.append((ids, done[number], PAGES[number]))
                done[number] += new
        yield make_batch(sequences, PAGE_SIZE, "cuda")
    assert tuple(done) == LENGTHS


def run_all(runner, tokenizer):
    logits = []
    for batch in batches(tokenizer):
        rows = torch.arange(batch.num_tokens, device="cuda")
        logits.append(runner.logits_at(batch, rows).float())
    return torch.cat(logits)


def divergence(found, expected):
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("mode", ["fp8-unit", "bf16", "emulate"])
def test_kernels_give_the_logits_of_the_reference(model, mode):
    with make_runner(model, "reference", mode) as runner:
        expected = run_all(runner, model.tokenizer)
    with make_runner(model, "triton", mode) as runner:
        found = run_all(runner, model.tokenizer)
    # bfloat16 rounds in other places: 5e-5 between two ways to compute the same prompt
    assert divergence(found, expected) < 1e-3


def test_a_captured_decode_step_follows_its_batch(model):
    with make_runner(model, "triton") as runner:
        *before, first, last = batches(model.tokenizer)
        # a graph is captured for the longest sequences that it shall serve
        first = dataclasses.replace(first, max_seq_len=256)
        for batch in before:
            runner.forward(batch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            runner.forward(first)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = runner.forward(first)
        graph.replay()
        torch.testing.assert_close(logits, runner.forward(first), rtol=1e-2, atol=1e-2)
        expected = runner.forward(last)
        # the sequence that has ended pads the batch
        first.slots[0], first.seq_lens[0], first.positions[0] = -1, 0, 0
        for name in ("token_ids", "positions", "slots", "prefix_lens", "seq_lens"):
            getattr(first, name)[1:].copy_(getattr(last, name))
        graph.replay()
        # another batch size rounds elsewhere in bfloat16
        assert divergence(logits[1:], expected) < 1e-3
