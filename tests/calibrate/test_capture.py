"""What capture counts is what an independent observer of the same forward passes sees."""

import inspect

import pytest
import torch

from fp8kv.calibrate.capture import Capture
from fp8kv.calibrate.data.batches import TokenBatch, make_batches
from fp8kv.calibrate.data.samples import Sample, token_digest
from fp8kv.calibrate.folds import HELD_OUT_FOLD, NUM_FOLDS
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.modeling.load import load_model
from fp8kv.demo import TRAIN_DATA
from fp8kv.recipes.errors import CalibrationError, UnsupportedModelError

TEXTS = [line[:600] for line in TRAIN_DATA.read_text().splitlines()[:6]]


def batch(*rows, fold=0, pad=0):
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    return TokenBatch(ids, torch.tensor([len(row) for row in rows]), fold)


def capture(model, facts, *batches):
    collected = Capture(model, facts)
    for one in batches:
        collected.run(one)
    return {layer.name: layer.streams for layer in collected.finish()}


def counted(stream):
    """Return how many values were counted, per fold and head."""
    return stream.histogram.sum(-1) + stream.zeros + stream.nonfinite


class Hooks:
    """Collect the outputs of submodules, by name, over forward passes of single unpadded rows."""

    def __init__(self, model, suffixes):
        self.outputs = {}
        self.handles = [
            module.register_forward_hook(
                lambda _module, _args, output, name=name: self.outputs.setdefault(name, []).append(
                    output[0]
                )
            )
            for name, module in model.named_modules()
            if name.endswith(suffixes)
        ]

    def run(self, model, rows):
        with torch.inference_mode():
            for row in rows:
                model(input_ids=torch.tensor([row]), use_cache=False)
        for handle in self.handles:
            handle.remove()
        return self.outputs


def turn(first, second, theta=10000.0):
    """Rotate pairs (first, second) of [tokens, ..., pairs] by their positions; theta is the models' own."""
    pairs = first.shape[-1]
    frequencies = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(len(first), dtype=torch.float64)[:, None] * frequencies
    angles = angles.view(len(first), *[1] * (first.ndim - 2), pairs)
    first, second = first.double(), second.double()
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ],
        dim=-1,
    )


def test_minimax_amax_equals_that_of_an_independent_hook(minimax):
    rows = [minimax.tokenizer(text)["input_ids"] for text in TEXTS]
    streams = capture(minimax.model, minimax.facts, batch(*rows[:4]), batch(*rows[4:], fold=3))
    seen = Hooks(minimax.model, ("k_norm", "v_proj")).run(minimax.model, rows)
    for name, found in streams.items():
        keys = []
        for output in seen[f"{name}.k_norm"]:
            heads = output.view(len(output), 2, 128)
            rotated = turn(heads[..., :32], heads[..., 32:64])
            keys.append(torch.cat([rotated, heads[..., 64:].double()], dim=-1))
        keys, values = torch.cat(keys), torch.cat(seen[f"{name}.v_proj"]).view(-1, 2, 128)
        close = {"rtol": 1e-4, "atol": 0}
        for stream, expected in (("K", keys), ("V", values)):
            absmax = expected.abs().amax(dim=(0, 2)).float()
            torch.testing.assert_close(found[stream].absmax.amax(0), absmax, **close)
            channels = expected.abs().amax(0).float()
            torch.testing.assert_close(found[stream].channel_absmax, channels, rtol=1e-3, atol=1e-4)
            assert found[stream].absmax[[0, 3]].amax(1).min() > 0
            assert found[stream].absmax[[1, 2, 4, 5, 6, 7]].max() == 0
    assert len(streams) == 6


def test_deepseek_amax_equals_that_of_an_independent_hook(deepseek):
    rows = [deepseek.tokenizer(text)["input_ids"] for text in TEXTS]
    streams = capture(deepseek.model, deepseek.facts, batch(*rows))
    hooked = ("kv_a_layernorm", "kv_a_proj_with_mqa")
    seen = Hooks(deepseek.model, hooked).run(deepseek.model, rows)
    for name, found in streams.items():
        latent = torch.cat(seen[f"{name}.kv_a_layernorm"])
        rope = torch.cat(
            [
                turn(output[:, 512::2], output[:, 513::2])
                for output in seen[f"{name}.kv_a_proj_with_mqa"]
            ]
        )
        assert set(found) == {"LATENT", "ROPE"}
        for stream, expected in (("LATENT", latent), ("ROPE", rope)):
            absmax = expected.abs().max().float().view(1)
            torch.testing.assert_close(found[stream].absmax[0], absmax, rtol=1e-4, atol=0)
    assert len(streams) == 5


@pytest.mark.parametrize("name", ["minimax", "deepseek"])
def test_every_value_of_every_token_is_counted_and_no_padding(request, name):
    loaded = request.getfixturevalue(name)
    rows = [loaded.tokenizer(text)["input_ids"] for text in TEXTS[:3]]
    rows[1] = rows[1][:7]
    tokens = sum(map(len, rows))
    for streams in capture(loaded.model, loaded.facts, batch(*rows)).values():
        for stream in streams.values():
            assert counted(stream)[0].tolist() == [tokens * stream.width] * stream.num_heads
            assert counted(stream)[1:].sum() == 0


def test_what_the_padding_is_changes_nothing(load, tiny_checkpoint, architecture):
    loaded = load(tiny_checkpoint(architecture))
    rows = torch.randint(0, 256, (2, 20)).tolist()
    rows[1] = rows[1][:9]
    one, other = (capture(loaded.model, loaded.facts, batch(*rows, pad=pad)) for pad in (258, 97))
    for name, streams in one.items():
        for stream, stats in streams.items():
            again = other[name][stream]
            assert torch.equal(counted(stats), counted(again))
            for field in ("absmax", "channel_absmax", "first_absmax"):
                torch.testing.assert_close(
                    getattr(stats, field), getattr(again, field), rtol=1e-4, atol=1e-6
                )
            moved = (stats.histogram - again.histogram).abs().sum() / stats.histogram.sum()
            assert moved < 0.01


def test_first_tokens_are_counted_apart_and_in_the_whole(load, tiny_checkpoint):
    loaded = load(tiny_checkpoint("llama"))
    rows = torch.randint(0, 256, (3, 10)).tolist()
    rows[2] = rows[2][:1]
    found = capture(loaded.model, loaded.facts, batch(*rows))
    alone = capture(loaded.model, loaded.facts, batch(*[row[:1] for row in rows]))
    for name, streams in found.items():
        for stream, stats in streams.items():
            expected = alone[name][stream]
            close = {"rtol": 1e-5, "atol": 0}
            torch.testing.assert_close(stats.first_absmax, expected.absmax[0], **close)
            assert stats.first_histogram.sum(-1).tolist() == [3 * stats.width] * stats.num_heads
            moved = (stats.first_histogram - expected.histogram[0]).abs().sum()
            assert moved <= 2  # a value may lie on the edge of a bin
            assert counted(stats)[0].tolist() == [21 * stats.width] * stats.num_heads


def test_the_held_out_fold_touches_nothing_that_scales_are_chosen_on(load, tiny_checkpoint):
    loaded = load(tiny_checkpoint("llama"))
    rows = torch.randint(0, 256, (2, 12)).tolist()
    plain = capture(loaded.model, loaded.facts, batch(rows[0]))
    both = capture(loaded.model, loaded.facts, batch(rows[0]), batch(rows[1], fold=HELD_OUT_FOLD))
    for name, streams in both.items():
        for stream, stats in streams.items():
            before = plain[name][stream]
            assert torch.equal(stats.histogram[:HELD_OUT_FOLD], before.histogram[:HELD_OUT_FOLD])
            assert torch.equal(stats.absmax[:HELD_OUT_FOLD], before.absmax[:HELD_OUT_FOLD])
            assert before.absmax[HELD_OUT_FOLD].max() == 0 < stats.absmax[HELD_OUT_FOLD].min()
            for field in ("channel_absmax", "first_absmax", "first_histogram", "pair_norm"):
                mine, its = getattr(stats, field), getattr(before, field)
                assert mine is its is None or torch.equal(mine, its)


def test_each_fold_is_counted_by_itself(load, tiny_checkpoint):
    loaded = load(tiny_checkpoint("llama"))
    batches = [
        batch(torch.randint(0, 256, (5 + fold,)).tolist(), fold=fold) for fold in range(NUM_FOLDS)
    ]
    for streams in capture(loaded.model, loaded.facts, *batches).values():
        for stats in streams.values():
            assert counted(stats)[:, 0].tolist() == [
                (5 + fold) * stats.width for fold in range(NUM_FOLDS)
            ]


def test_the_order_of_batches_changes_no_bit(load, tiny_checkpoint):
    loaded = load(tiny_checkpoint("deepseek_v3"))
    batches = [
        batch(*torch.randint(0, 256, (2, 8)).tolist(), fold=fold) for fold in (0, 3, 0, 7, 3)
    ]
    one = capture(loaded.model, loaded.facts, *batches)
    other = capture(loaded.model, loaded.facts, *reversed(batches))
    for name, streams in one.items():
        for stream, stats in streams.items():
            for field, value in vars(stats).items():
                again = getattr(other[name][stream], field)
                assert torch.equal(value, again) if torch.is_tensor(value) else value == again


@pytest.mark.parametrize("name", ["minimax", "deepseek"])
def test_how_samples_are_batched_changes_rounding_only(request, name):
    loaded = request.getfixturevalue(name)
    ids = [torch.tensor(loaded.tokenizer(text)["input_ids"][:90]).int() for text in TEXTS]
    samples = [Sample(one, token_digest(one), fold=0) for one in ids]
    one, other = (
        capture(
            loaded.model,
            loaded.facts,
            *make_batches(samples, pad_token_id=2, batch_size=batch_size),
        )
        for batch_size in (1, 4)
    )
    for layer, streams in one.items():
        for stream, stats in streams.items():
            again = other[layer][stream]
            assert torch.equal(counted(stats), counted(again))
            for field in ("absmax", "channel_absmax", "first_absmax"):
                torch.testing.assert_close(
                    getattr(stats, field), getattr(again, field), rtol=1e-3, atol=1e-4
                )
            moved = (stats.histogram - again.histogram).abs().sum()
            assert moved / stats.histogram.sum() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_counted_as_they_are_in_the_models_dtype(tiny_checkpoint, dtype):
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    model = load_model(checkpoint, dtype=dtype, device="cpu")
    rows = torch.randint(0, 256, (2, 3)).tolist()
    streams = capture(model, model_facts(checkpoint), batch(*rows))
    seen = []
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda _module, _args, output: seen.append(output)
    )
    with torch.inference_mode():
        model(input_ids=torch.tensor(rows), use_cache=False)
    hook.remove()
    assert seen[0].dtype == dtype
    values = streams["model.layers.0.self_attn"]["V"]
    heads = seen[0].view(2, 3, values.num_heads, values.width)
    assert torch.equal(values.absmax[0], heads.abs().amax(dim=(0, 1, 3)).float())
    assert torch.equal(values.channel_absmax, heads.abs().amax(dim=(0, 1)).float())
    assert values.channel_absmax.dtype == torch.float32
    assert values.bfloat16 == (dtype == torch.bfloat16)
    assert (counted(values)[0] == 6 * values.width).all()


# in their first layer the same token has the same K wherever it stands, but for the rotation
ROTATED_FROM_THE_START = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma4_text", "gpt_oss"),
    *("llama4_text", "minimax_m2", "glm4_moe", "mimo_v2_flash", "deepseek_v2", "deepseek_v3"),
    *("glm4_moe_lite", "longcat_flash", "mistral3", "kimi_k25", "minicpm3", "youtu"),
]


@pytest.mark.parametrize("model_type", ROTATED_FROM_THE_START)
def test_the_pair_norm_bounds_a_token_at_every_position(load, tiny_checkpoint, model_type):
    loaded = load(tiny_checkpoint(model_type))
    once, often = (
        next(iter(capture(loaded.model, loaded.facts, batch([97] * count)).values()))
        for count in (1, 24)
    )
    stream, other = ("ROPE", "LATENT") if "ROPE" in once else ("K", "V")
    norm = once[stream].pair_norm
    torch.testing.assert_close(often[stream].pair_norm, norm, rtol=1e-4, atol=0)
    assert (often[stream].absmax[0] <= norm * (1 + 1e-5)).all()
    assert not torch.allclose(often[stream].channel_absmax, once[stream].channel_absmax)
    assert once[other].pair_norm is often[other].pair_norm is None


def test_no_cache_is_held(load, tiny_checkpoint, monkeypatch):
    loaded = load(tiny_checkpoint("llama"))
    outputs = []
    forward = type(loaded.model.model).forward

    def keep(*arguments, **options):
        outputs.append(forward(*arguments, **options))
        return outputs[-1]

    monkeypatch.setattr(type(loaded.model.model), "forward", keep)
    capture(loaded.model, loaded.facts, batch([1, 2, 3]))
    assert [output.past_key_values for output in outputs] == [None]


def test_layers_that_record_nothing_are_named(load, tiny_checkpoint, monkeypatch):
    loaded = load(tiny_checkpoint("llama"))
    attention = loaded.model.model.layers[1].self_attn
    forward = attention.forward

    def skip_update(hidden_states, past_key_values=None, **options):
        return forward(hidden_states, past_key_values=None, **options)

    assert "past_key_values" in inspect.signature(skip_update).parameters
    monkeypatch.setattr(attention, "forward", skip_update)
    collected = Capture(loaded.model, loaded.facts)
    assert collected.expected_layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    collected.run(batch([1, 2, 3]))
    for check in (collected.check, collected.finish):
        with pytest.raises(CalibrationError) as error:
            check()
        assert str(error.value) == (
            "1 of 2 attention layers recorded nothing, first model.layers.1.self_attn: "
            "all of them: model.layers.1.self_attn"
        )


def test_without_a_batch_every_layer_is_missing(load, tiny_checkpoint):
    loaded = load(tiny_checkpoint("llama"))
    with pytest.raises(CalibrationError, match=r"2 of 2 attention layers recorded nothing"):
        Capture(loaded.model, loaded.facts).finish()


@pytest.mark.parametrize(
    ("name", "part", "stream", "per_token"),
    [
        ("minimax_m2", "v_proj", "V", 1),
        ("minimax_m2", "k_norm", "K", 2),  # RoPE mixes a pair
        ("deepseek_v3", "kv_a_layernorm", "LATENT", 1),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named_by_layer_and_stream(
    load, tiny_checkpoint, name, part, stream, per_token, value
):
    loaded = load(tiny_checkpoint(name))
    weight = getattr(loaded.model.model.layers[1].self_attn, part).weight
    weight.data.view(-1)[3] = value
    collected = Capture(loaded.model, loaded.facts)
    collected.run(batch([1, 2, 3]))
    with pytest.raises(CalibrationError) as error:
        collected.finish()
    message = str(error.value)
    count = 3 * per_token
    assert message.startswith(f"{stream} of model.layers.1.self_attn holds {count} NaN or Inf val")
    assert "--dtype float32" in message


def test_a_model_of_other_layers_is_refused_before_it_runs(load, tiny_checkpoint):
    loaded, other = load(tiny_checkpoint("llama")), load(tiny_checkpoint("llama4_text"))
    with pytest.raises(UnsupportedModelError, match="do not match: 2 only in the checkpoint"):
        Capture(loaded.model, other.facts)


def test_statistics_can_be_read_and_counting_goes_on(load, tiny_checkpoint):
    loaded = load(tiny_checkpoint("llama"))
    collected = Capture(loaded.model, loaded.facts)
    collected.run(batch([1, 2, 3]))
    before = collected.finish()
    kept = before[0].streams["K"].histogram.clone()
    collected.run(batch([4, 5]))
    assert torch.equal(before[0].streams["K"].histogram, kept)
    assert collected.finish()[0].streams["K"].histogram.sum() > kept.sum()
