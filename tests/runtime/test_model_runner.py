"""The paged model equals the unmodified one, architecture by architecture, and is given back as it was found."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.modeling.tap import find_attention_modules
from fp8kv.recipes.errors import RequestError, UnsupportedModelError
from fp8kv.runtime.backends import choose_backend
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.evaluation.emulated_cache import emulated_cache, fp8_at_unit_scale
from fp8kv.runtime.model_runner import ModelRunner
from fp8kv.runtime.paged_cache import build_cache, measure_dims

DRIVEN = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "minimax_m2",
    "glm4_moe",
    "mimo_v2_flash",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "longcat_flash",
    "mistral3",
    "gemma3",
    "kimi_k25",
    "minicpm3",
    "youtu",
]

TOLERANCE = 1e-5
"""Of the largest logit. Two orders of summation differ by up to 3e-6 of it, and so does each from float64."""

PAGE_SIZE = 4
PAGES = 20
LENGTHS = (23, 11, 17)
# pages of each sequence: in no order, and none beside another
PAGE_LISTS = ([17, 3, 9, 1, 13, 6], [8, 19, 4], [15, 2, 11, 7, 0])
# each forward's new tokens of each sequence: chunked prefill, prefill beside decode, decode alone
STEPS = ((9, 8, 0), (6, 1, 14), (7, 1, 1), (1, 0, 1), (0, 1, 1))


@pytest.fixture(scope="module")
def model_of(tiny_checkpoint, load):
    """Give a tiny float32 model with transformers' eager attention."""
    loaded = {}

    def get(model_type):
        if model_type not in loaded:
            model = load(tiny_checkpoint(model_type)).model
            model.set_attn_implementation("eager")
            loaded[model_type] = model
        return loaded[model_type]

    return get


def make_cache(model, mode="float32"):
    """Build a cache of ``mode`` whose pages hold NaN, so that a read of what was never written shows."""
    modules = find_attention_modules(model)
    cache = build_cache(
        modules,
        measure_dims(model, modules),
        mode=mode,
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        device="cpu",
        scales=None,
    )
    for layer in cache.layers.values():
        for stream in (layer.k, layer.v):
            if stream is not None:
                stream.fill_(math.nan)
    return cache


def make_runner(model, mode="float32"):
    return ModelRunner(model, make_cache(model, mode), choose_backend("reference", "cpu"))


def all_logits(runner, batch):
    return runner.logits_at(batch, torch.arange(batch.num_tokens))


def texts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 200, (length,), generator=generator).tolist() for length in LENGTHS]


def recomputed(model, token_ids):
    """Return the unmodified model's logits of every token, ``[tokens, vocabulary]``."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


def batches():
    """Give each forward's batch and the rows of the recomputed logits that it must equal."""
    token_ids, done = texts(), [0] * len(LENGTHS)
    for step in STEPS:
        sequences, rows = [], []
        for number, new in enumerate(step):
            if new:
                start, end = done[number], done[number] + new
                sequences.append((token_ids[number][start:end], start, PAGE_LISTS[number]))
                rows.append((number, start, end))
                done[number] = end
        yield make_batch(sequences, PAGE_SIZE, "cpu"), rows
    assert tuple(done) == LENGTHS


def run_all(runner):
    """Return the logits of every token of every text as the paged model computes them, by text."""
    logits = [[] for _ in LENGTHS]
    for batch, rows in batches():
        every = all_logits(runner, batch)
        ends = torch.tensor([end - start for _, start, end in rows]).cumsum(0)
        # the same tokens again, into the same slots
        torch.testing.assert_close(runner.forward(batch), every[ends - 1].float())
        for (number, _, _), part in zip(
            rows, every.split([e - s for _, s, e in rows]), strict=True
        ):
            logits[number].append(part)
    return [torch.cat(parts) for parts in logits]


def padded(batch, count):
    """Add ``count`` sequences to a decode batch that are there for its size only."""
    return dataclasses.replace(
        batch,
        token_ids=nn.functional.pad(batch.token_ids, (0, count)),
        positions=nn.functional.pad(batch.positions, (0, count)),
        slots=nn.functional.pad(batch.slots, (0, count), value=-1),
        page_table=nn.functional.pad(batch.page_table, (0, 0, 0, count), value=-1),
        prefix_lens=nn.functional.pad(batch.prefix_lens, (0, count)),
        seq_lens=nn.functional.pad(batch.seq_lens, (0, count)),
        cu_seqlens=torch.arange(batch.num_sequences + count + 1, dtype=torch.int32),
        num_decodes=batch.num_sequences + count,
    )


def snapshot(model):
    """Return all of a model that a runner could leave changed."""
    modules = {
        name: (
            sorted(vars(module)),
            sorted(module._forward_pre_hooks),
            sorted(module._forward_hooks),
        )
        for name, module in model.named_modules()
    }
    configs = [model.config, model.config.get_text_config()]
    return (
        modules,
        [config._attn_implementation for config in configs],
        [sorted(vars(config)) for config in configs],
        {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
    )


def largest(logits):
    return max(part.abs().max().item() for part in logits)


def largest_difference(found, expected):
    return max((f - e).abs().max().item() for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("model_type", DRIVEN)
def test_packed_prefill_and_decode_equal_the_unmodified_model(model_of, model_type):
    model = model_of(model_type)
    expected = [recomputed(model, ids) for ids in texts()]
    with make_runner(model) as runner:
        found = run_all(runner)
    assert largest_difference(found, expected) < TOLERANCE * largest(expected)


@pytest.mark.parametrize("model_type", DRIVEN)
def test_an_fp8_cache_equals_the_model_with_an_emulated_one(model_of, tiny_checkpoint, model_type):
    model, facts = model_of(model_type), model_facts(open_checkpoint(tiny_checkpoint(model_type)))
    with emulated_cache(model, facts, fp8_at_unit_scale()):
        expected = torch.cat([recomputed(model, ids) for ids in texts()])
    with make_runner(model, "fp8-unit") as runner:
        found = torch.cat(run_all(runner))
    # the median: where rounding lets a value fall on the other side of a code, the tokens behind it differ
    difference = (found - expected).abs().amax(dim=-1).median()
    assert difference < TOLERANCE * largest([expected])
    plain = torch.cat([recomputed(model, ids) for ids in texts()])
    assert (found - plain).abs().amax(dim=-1).median() > 100 * TOLERANCE * largest([expected])


# a narrow rotary part, norms before RoPE, K wider than V; float32 queries have no kernel, the fused write has one
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "minimax_m2", "mimo_v2_flash", "gpt_oss"])
def test_a_backend_that_rotates_while_it_writes_changes_nothing(model_of, model_type, monkeypatch):
    triton = pytest.importorskip("fp8kv.runtime.backends.triton")
    model = model_of(model_type)
    before = snapshot(model)
    with make_runner(model, "fp8-unit") as runner:
        expected = run_all(runner)
    rotated, fused = [], triton.rope_cache_write
    monkeypatch.setattr(
        triton, "rope_cache_write", lambda *a, **k: (rotated.append(1), fused(*a, **k))[1]
    )
    with ModelRunner(model, make_cache(model, "fp8-unit"), triton.TritonBackend()) as runner:
        found = run_all(runner)
    assert snapshot(model) == before
    # twice for each of the steps and layers, but not where transformers keeps cosines in another arrangement
    assert len(rotated) == (0 if model_type == "gpt_oss" else 2 * 2 * len(STEPS))
    # the median: where rounding lets a value fall on the other side of a code, the tokens behind it differ
    pairs = zip(found, expected, strict=True)
    differences = torch.cat([(f - e).abs().amax(-1) for f, e in pairs])
    assert differences.median() < TOLERANCE * largest(expected)


class PlainBackend:
    """A backend without the hook: what the protocol asks for, and no more."""

    name = "plain"

    def __init__(self):
        self._reference = choose_backend("reference", "cpu")
        self.write = self._reference.write
        self.attend = self._reference.attend


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_backend_without_the_hook_takes_new_tokens_as_they_were_computed(model_of, model_type):
    model, batch = model_of(model_type), next(batches())[0]
    with make_runner(model, "fp8-unit") as runner:
        quantised = all_logits(runner, batch)
    reference = choose_backend("reference", "cpu")
    with ModelRunner(model, make_cache(model, "fp8-unit"), reference, prefill="bf16") as runner:
        expected = all_logits(runner, batch)
    with ModelRunner(model, make_cache(model, "fp8-unit"), PlainBackend()) as runner:
        assert torch.equal(all_logits(runner, batch), expected)
    assert (expected - quantised).abs().max() > 100 * TOLERANCE * largest([quantised])
    # without a prefix nothing is read from the cache
    rows = [recomputed(model, ids[:new]) for ids, new in zip(texts(), STEPS[0], strict=True) if new]
    assert largest_difference([expected], [torch.cat(rows)]) < TOLERANCE * largest(rows)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_what_is_behind_a_prefix_or_decodes_reads_codes_on_the_plain_path_too(model_of, model_type):
    model = model_of(model_type)
    reference = choose_backend("reference", "cpu")
    with make_runner(model, "float32") as runner:
        unquantised = run_all(runner)
    with ModelRunner(model, make_cache(model, "fp8-unit"), reference, prefill="bf16") as runner:
        found = run_all(runner)
    # the second text's second chunk is one token behind eight
    difference = (found[1] - unquantised[1]).abs().amax(-1)
    assert (difference[:8] < TOLERANCE * largest(unquantised)).all()
    assert difference[8] > 100 * TOLERANCE * largest(unquantised)


def test_an_unknown_prefill_is_refused(model_of):
    model = model_of("llama")
    before = snapshot(model)
    with pytest.raises(RequestError, match="prefill is 'fp16': give one of fp8, bf16"):
        ModelRunner(model, make_cache(model), choose_backend("reference", "cpu"), prefill="fp16")
    assert snapshot(model) == before


def test_logits_of_chosen_tokens_are_those_of_all(model_of):
    with make_runner(model_of("llama")) as runner:
        batch = next(batches())[0]
        rows = torch.tensor([2, 9, 16])
        assert torch.equal(runner.logits_at(batch, rows), all_logits(runner, batch)[rows])


def test_mistral4_scales_queries_by_position(model_of, monkeypatch):
    model = model_of("mistral3")
    # what the tiny model's texts are too short for otherwise
    rope = model.config.text_config.rope_parameters
    monkeypatch.setitem(rope, "original_max_position_embeddings", 8)
    expected = [recomputed(model, ids) for ids in texts()]
    with make_runner(model) as runner:
        found = run_all(runner)
    assert largest_difference(found, expected) < TOLERANCE * largest(expected)
    monkeypatch.undo()
    unscaled = [recomputed(model, ids) for ids in texts()]
    assert largest_difference(found, unscaled) > 1e-2


# without experts, among which rounding would choose others
@pytest.mark.parametrize("model_type", ["gemma2", "minicpm3"])
def test_a_bfloat16_model_runs_in_bfloat16(model_of, model_type):
    model = copy.deepcopy(model_of(model_type)).to(torch.bfloat16)
    expected = [recomputed(model, ids) for ids in texts()]
    with make_runner(model, "bf16") as runner:
        found = run_all(runner)
        batch, _ = next(batches())
        assert runner.forward(batch).dtype == torch.float32
    assert {logits.dtype for logits in found} == {torch.bfloat16}
    mean = [(f - e).float().abs().mean() for f, e in zip(found, expected, strict=True)]
    assert max(mean) < 0.01 * largest(expected)


def test_padding_leaves_cache_and_logits_alone(model_of):
    model = model_of("llama")
    token_ids = texts()
    with make_runner(model) as runner:
        cache = runner.cache
        prompts = [(ids[:-1], 0, pages) for ids, pages in zip(token_ids, PAGE_LISTS, strict=True)]
        runner.forward(make_batch(prompts, PAGE_SIZE, "cpu"))
        steps = [
            (ids[-1:], len(ids) - 1, pages)
            for ids, pages in zip(token_ids, PAGE_LISTS, strict=True)
        ]
        decode = make_batch(steps, PAGE_SIZE, "cpu")
        expected = runner.forward(decode)
        before = [layer.k.clone() for layer in cache.layers.values()]
        found = runner.forward(padded(decode, 2))
    assert torch.equal(found[: len(steps)], expected)
    assert found.isfinite().all()
    for layer, k in zip(cache.layers.values(), before, strict=True):
        torch.testing.assert_close(layer.k, k, rtol=0, atol=0, equal_nan=True)


def test_every_other_tiny_model_is_refused(model_of, tiny_models):
    for model_type in sorted(set(tiny_models.TINY_MODELS) - set(DRIVEN)):
        model = model_of(model_type)
        cache = make_cache(model)
        with pytest.raises(UnsupportedModelError, match="the runtime cannot drive"):
            ModelRunner(model, cache, choose_backend("reference", "cpu"))


def test_refuses_a_window_that_only_the_mask_knows(model_of):
    model = copy.deepcopy(model_of("mistral"))
    model.config.sliding_window = None
    with make_runner(model) as runner:
        model.config.sliding_window = 8
        with pytest.raises(UnsupportedModelError, match=r"window of 8 tokens where .* says None"):
            run_all(runner)


def test_refuses_attention_with_arguments_it_does_not_know(model_of):
    model = model_of("llama")
    with make_runner(model) as runner:
        runner.forward(next(batches())[0])
        module = model.model.layers[0].self_attn
        function = AttentionInterface()[model.config._attn_implementation]
        with pytest.raises(UnsupportedModelError, match="attends with position_bias, which"):
            function(module, None, None, None, None, scaling=1.0, position_bias=torch.ones(1))
        with pytest.raises(UnsupportedModelError, match="attends with attention_mask, which"):
            function(module, None, None, None, torch.ones(1), scaling=1.0)


def test_refuses_a_module_that_attends_by_itself(model_of):
    model = copy.deepcopy(model_of("llama"))
    module = model.model.layers[1].self_attn
    module.forward = lambda hidden_states, past_key_values=None, **_: (hidden_states, None)
    runner = ModelRunner(model, make_cache(model_of("llama")), choose_backend("reference", "cpu"))
    with (
        runner,
        pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn \(1 of 2 attention"),
    ):
        runner.forward(next(batches())[0])


def test_refuses_a_module_that_attends_without_caching(model_of):
    model = copy.deepcopy(model_of("llama"))
    module = model.model.layers[1].self_attn
    forward = module.forward
    # the hook's stand-in for a cache is dropped, so nothing is written
    module.forward = lambda hidden_states, past_key_values=None, **kwargs: forward(
        hidden_states, **kwargs
    )
    runner = ModelRunner(model, make_cache(model_of("llama")), choose_backend("reference", "cpu"))
    with runner, pytest.raises(UnsupportedModelError, match="attends before it updates its cache"):
        runner.forward(next(batches())[0])


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt_oss", "deepseek_v3", "longcat_flash", "gemma3"]
)
def test_leaves_the_model_as_it_found_it(model_of, model_type):
    model = model_of(model_type)
    before, logits = snapshot(model), recomputed(model, texts()[0])
    with make_runner(model) as runner:
        runner.forward(next(batches())[0])
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert torch.equal(recomputed(model, texts()[0]), logits)
    runner.close()
    assert snapshot(model) == before


def test_leaves_the_vision_tower_alone(model_of):
    model = model_of("gemma3")
    with make_runner(model):
        assert model.config.vision_config._attn_implementation == "eager"
        assert model.config.text_config._attn_implementation != "eager"


def test_gives_the_model_back_after_an_error(model_of):
    model = model_of("deepseek_v3")
    before = snapshot(model)
    batch, _ = next(batches())
    with pytest.raises(IndexError), make_runner(model) as runner:
        runner.forward(dataclasses.replace(batch, token_ids=batch.token_ids + 10_000))
    assert snapshot(model) == before


def test_a_failed_forward_leaves_the_runner_usable(model_of):
    with make_runner(model_of("llama")) as runner:
        batch, _ = next(batches())
        expected = runner.forward(batch)
        with pytest.raises(IndexError):
            runner.forward(dataclasses.replace(batch, token_ids=batch.token_ids + 10_000))
        assert torch.equal(runner.forward(batch), expected)


def test_refuses_a_second_runner_on_one_model(model_of):
    model = model_of("llama")
    with make_runner(model) as runner:
        held = snapshot(model)
        with pytest.raises(RequestError, match="this LlamaForCausalLM is in use"):
            ModelRunner(model, runner.cache, choose_backend("reference", "cpu"))
        assert snapshot(model) == held
    with make_runner(model) as runner:
        assert runner.forward(next(batches())[0]).isfinite().all()


def test_refuses_a_cache_of_another_model(model_of):
    cache = make_cache(model_of("llama4_text"))
    with pytest.raises(ValueError, match=r"the cache has the layers .*layers\.3\.self_attn"):
        ModelRunner(model_of("llama"), cache, choose_backend("reference", "cpu"))


def test_refuses_to_run_closed_or_to_be_passed_by(model_of):
    model = model_of("llama")
    with make_runner(model) as runner, pytest.raises(ValueError, match="close it before the model"):
        recomputed(model, [3, 4, 5])
    with pytest.raises(ValueError, match="this runner is closed"):
        runner.forward(next(batches())[0])
