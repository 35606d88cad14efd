"""Rows and sentences of the tables."""

import shlex
from pathlib import Path

import pytest

from fp8kv.calibrate.formats.targets import TargetEffect
from fp8kv.calibrate.verdicts import ConvergencePoint
from fp8kv.recipes import default_recipe, load_recipe, override
from fp8kv.tables import (
    convergence_sentence,
    plan_rows,
    serve_commands,
    short_names,
    verdict_sentence,
)

VLLM = "vllm serve {model} --kv-cache-dtype fp8"
SGLANG = "python -m sglang.launch_server --model-path {model}"


def effect(target, serve):
    return TargetEffect(target, "loads", "", serve, "")


class Judged:
    def __init__(self, verdict):
        self.verdict = verdict


@pytest.mark.parametrize(
    ("names", "pattern", "short"),
    [
        (
            ["model.layers.0.self_attn", "model.layers.11.self_attn"],
            "model.layers.*.self_attn",
            ["0", "11"],
        ),
        (["model.layers.7.self_attn"], "model.layers.*.self_attn", ["7"]),
        (
            ["model.layers.0.self_attn.0", "model.layers.0.self_attn.1"],
            "model.layers.*.self_attn.*",
            ["0.0", "0.1"],
        ),
        (["a.0.x", "a.1.y"], "a.*.*", ["0.x", "1.y"]),
        (["a.0.x", "a.1"], "", ["a.0.x", "a.1"]),
        (["attention"], "", ["attention"]),
        ([], "", []),
    ],
)
def test_short_names_keep_what_differs(names, pattern, short):
    found, by_name = short_names(names)

    assert found == pattern
    assert [by_name[name] for name in names] == short
    assert len(set(short)) == len(names), "no two alike"


def test_serve_commands_take_the_recipes_flags_once():
    effects = [effect("vllm", VLLM), effect("sglang", SGLANG)]

    commands = serve_commands(effects, Path("/m"), load_recipe("kimi-k2.5"))

    assert commands == [
        "vllm serve /m --kv-cache-dtype fp8 --tensor-parallel-size 8 --trust-remote-code",
        "python -m sglang.launch_server --model-path /m --tensor-parallel-size 8 --trust-remote-code",
    ]


def test_serve_commands_survive_a_shell():
    recipe = override(default_recipe(), {"serve.vllm": "--hf-overrides '{\"a\": 1}'"})

    (command,) = serve_commands([effect("vllm", VLLM)], Path("/my models/it's"), recipe)

    assert shlex.split(command) == [
        *("vllm", "serve", "/my models/it's", "--kv-cache-dtype", "fp8"),
        *("--hf-overrides", '{"a": 1}'),
    ]


def test_serve_commands_of_two_targets_that_are_one_engine_appear_once():
    effects = [effect("vllm", VLLM), effect("modelopt", VLLM)]

    assert len(serve_commands(effects, Path("m"), default_recipe())) == 1


def test_verdict_sentence_counts():
    flat = [Judged("flat")] * 3

    assert verdict_sentence(flat).startswith("all 3 streams are flat")
    mixed = verdict_sentence([*flat, Judged("clip"), Judged("underflow"), Judged("underflow")])
    assert mixed.startswith("scale 1.0 saturates 1 and underflows 2 of 6 streams")


def test_convergence_sentence_looks_at_half_of_the_data():
    curve = [
        ConvergencePoint(1000, 1.0, 0.5),
        ConvergencePoint(2500, 0.5, 0.0),
        ConvergencePoint(4000, 0.0, 0.0),
    ]

    assert convergence_sentence(curve) == (
        "with 2,500 of 4,000 tokens the scales were within 41.4% of the final ones (median 0.0%)"
    )
    assert convergence_sentence(curve[:1]).startswith("too little data")


@pytest.mark.parametrize(
    ("size", "shown"), [(48, "48 bytes"), (15_254_400, "15.3 MB"), (2_300_000_000_000, "2.3 TB")]
)
@pytest.mark.parametrize(
    ("seconds", "time"), [(0.4, "0 s"), (88.3, "88 s"), (300, "5 min"), (9000, "2.5 h")]
)
def test_a_plan_is_in_units_that_people_read(size, shown, seconds, time):
    facts = dict.fromkeys(
        ("model", "architecture", "attention", "base", "device", "dtype", "recipe"), "x"
    )
    facts |= dict.fromkeys(("samples", "seq_len", "tokens_at_most", "scale_tensors"), 1)
    facts |= {"streams": ["K", "V"], "layers": 2, "estimated_forward_seconds": seconds}
    facts |= {"weight_bytes_read": size, "bytes_written": size}

    rows = dict(plan_rows(facts, override(default_recipe(), {"scales.estimator": "percentile"})))

    assert rows["base"] == f"x, {shown} of weights"
    assert rows["written"] == f"1 scales, {shown}"
    assert rows["time"] == f"{time} or longer"
    assert rows["scales"].startswith("percentile 99.99, per tensor, e4m3fn")
