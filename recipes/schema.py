"""What a recipe says: frozen dataclasses, one per YAML section, and the checks that span fields.

The field names are the YAML keys, the field types are what :mod:`fp8kv.recipes.build` converts to, and the
defaults stand here and nowhere else. A section that is left out of a file takes its defaults.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from .errors import RecipeError

SCHEMA_VERSION = 1

Attention: TypeAlias = Literal["gqa", "mla"]
ChatTemplate: TypeAlias = Literal["auto", "always", "never"]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Estimator: TypeAlias = Literal["absmax", "percentile", "mse"]
Granularity: TypeAlias = Literal["tensor", "head"]
Fp8Format: TypeAlias = Literal["e4m3fn", "e5m2", "e4m3fnuz"]
QuantisedArm: TypeAlias = Literal["fp8-unit", "fp8", "emulate"]
TargetName: TypeAlias = Literal["vllm", "sglang", "transformers", "modelopt"]


@dataclass(frozen=True)
class Model:
    """Name the checkpoints that a recipe is for; every field may be left out.

    Attributes:
        ids: Hub ids that the recipe was written for.
        model_type: Values of ``model_type`` in ``config.json`` that the recipe accepts; empty accepts all.
        attention: ``gqa`` (K and V are cached) or ``mla`` (one latent row is cached).
        facts: Keys of ``config.json`` and the value that each must have; a list means one of its entries.
    """

    ids: tuple[str, ...] = ()
    model_type: tuple[str, ...] = ()
    attention: Attention | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, expected in self.facts.items():
            options = expected if isinstance(expected, list | tuple) else (expected,)
            if not options or not all(isinstance(x, str | int | float) for x in options):
                raise RecipeError(
                    f"model.facts.{key} is {expected!r}; expected a number, text, true or false, "
                    "or a list of accepted ones"
                )


@dataclass(frozen=True)
class Source:
    """Name one dataset of the calibration mix.

    Attributes:
        dataset: A hub name, a local path, or ``builtin:gsm-synth`` (ships with fp8kv, needs no network).
        config: The hub subset, for datasets that have several.
        split: The split to read.
        column: The column to read; without one, ``text``, ``messages`` or ``question`` with ``answer`` is found.
        weight: Share of the samples, relative to the other sources.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    """Say what to calibrate on.

    Attributes:
        sources: The datasets to mix.
        num_samples: Number of samples over all sources.
        seq_len: Longest sample, in tokens.
        seed: Seed of the choice and order of samples.
        chat_template: ``auto`` applies the tokenizer's template to conversations and leaves plain text alone.
    """

    sources: tuple[Source, ...] = (
        Source("HuggingFaceH4/ultrachat_200k", split="train_sft", column="messages"),
    )
    num_samples: int = 512
    seq_len: int = 2048
    seed: int = 0
    chat_template: ChatTemplate = "auto"

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "data.sources", "empty", "at least one dataset")
        for index, source in enumerate(self.sources):
            path = f"data.sources[{index}]"
            _require(source.dataset != "", f"{path}.dataset", "empty", "a dataset name or path")
            _require(source.split != "", f"{path}.split", "empty", "the name of a split")
            _require_positive(f"{path}.weight", source.weight)
        _require_at_least("data.num_samples", self.num_samples, 1)
        _require_at_least("data.seq_len", self.seq_len, 1)
        _require_at_least("data.seed", self.seed, 0)


@dataclass(frozen=True)
class Calibration:
    """Say how to run the forward passes.

    Attributes:
        batch_size: Samples per forward pass; None fills a token budget that suits the device.
        dtype: Compute type of the model; ``auto`` takes the checkpoint's own.
    """

    batch_size: int | None = None
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            _require_at_least("calibration.batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class Scales:
    """Say how scales follow from the statistics.

    Attributes:
        estimator: How the magnitude that must fit is chosen.
        percentile: The percentile of magnitudes in (0, 100]; read by the ``percentile`` estimator alone.
        headroom: Factor on that magnitude; above 1 leaves room for values that calibration did not meet.
        power_of_two: Round each scale up to a power of two, which every engine's scale type holds exactly.
        granularity: One scale per tensor, or one per KV head.
        fp8_format: The cache's number format.
    """

    estimator: Estimator = "absmax"
    percentile: float = 99.99
    headroom: float = 1.0
    power_of_two: bool = True
    granularity: Granularity = "tensor"
    fp8_format: Fp8Format = "e4m3fn"

    def __post_init__(self) -> None:
        _require(
            0.0 < self.percentile <= 100.0,
            "scales.percentile",
            self.percentile,
            "a number above 0 and at most 100",
        )
        _require_positive("scales.headroom", self.headroom)


@dataclass(frozen=True)
class Output:
    """Say which engines must be able to load the result.

    Attributes:
        targets: Names of the engines to write for.
    """

    targets: tuple[TargetName, ...] = ("vllm", "sglang")

    def __post_init__(self) -> None:
        _require(len(self.targets) > 0, "output.targets", "empty", "at least one engine")
        _require(
            len(set(self.targets)) == len(self.targets),
            "output.targets",
            f"[{', '.join(self.targets)}]",
            "each engine once",
        )


@dataclass(frozen=True)
class Serve:
    """Suggest flags to serve the result with, per engine; empty suggests none.

    Attributes:
        vllm: Flags for ``vllm serve``.
        sglang: Flags for ``python -m sglang.launch_server``.
    """

    vllm: str = ""
    sglang: str = ""


@dataclass(frozen=True)
class Expect:
    """Say how far a quantised cache may fall behind the unquantised one; None expects nothing.

    ``fp8kv eval --expect`` checks what is said here and fails where it does not hold.

    Attributes:
        arm: The cache that must hold it, as ``fp8kv eval`` names it.
        max_accuracy_drop: Percentage points of GSM8K exact match, under either filter.
        max_task_drop: Percentage points of any metric of an lm-evaluation-harness task of which more is better.
        max_kl: Mean divergence from the unquantised cache, in nats per token.
        min_top1: Share of tokens whose likeliest token is the unquantised cache's, in [0, 1].
        max_perplexity_ratio: Perplexity over that of the unquantised cache.
        min_needle_recall: Share of needles that are found, in [0, 1].
    """

    arm: QuantisedArm = "fp8"
    max_accuracy_drop: float | None = None
    max_task_drop: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    max_perplexity_ratio: float | None = None
    min_needle_recall: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_accuracy_drop", "max_task_drop", "max_kl"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"expect.{name}", value, "a number of at least 0")
        for name in ("min_top1", "min_needle_recall"):
            value = getattr(self, name)
            expected = "a number from 0 to 1"
            _require(value is None or 0 <= value <= 1, f"expect.{name}", value, expected)
        if self.max_perplexity_ratio is not None:
            _require_positive("expect.max_perplexity_ratio", self.max_perplexity_ratio)


@dataclass(frozen=True)
class Recipe:
    """Say what to calibrate, on what, how, for which engines, and what was measured.

    Attributes:
        name: Name of the recipe; a built-in recipe's file has the same name.
        description: One line for lists.
        model: The checkpoints that it is for.
        data: What to calibrate on.
        calibration: How to run the model.
        scales: How scales follow from the statistics.
        output: Which engines to write for.
        serve: Suggested flags per engine.
        expect: How far a quantised cache may fall behind the unquantised one.
        measured: What was measured with this recipe, free form (``exact_match``, ``gpu``, ``date``, ...);
            empty where nothing was.
    """

    name: str
    description: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    calibration: Calibration = field(default_factory=Calibration)
    scales: Scales = field(default_factory=Scales)
    output: Output = field(default_factory=Output)
    serve: Serve = field(default_factory=Serve)
    expect: Expect = field(default_factory=Expect)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.name.strip() != "", "name", "empty", "the name of the recipe")
        # Every head of an MLA layer reads the same cached row, so there is nothing to scale per head.
        if self.model.attention == "mla" and self.scales.granularity == "head":
            raise RecipeError(
                'scales.granularity is "head" while model.attention is "mla"; all heads of an MLA layer '
                'share one cached row, so use "tensor"'
            )


def _require(condition: bool, path: str, value: object, expected: str) -> None:
    if not condition:
        raise RecipeError(f"{path} is {value}; expected {expected}")


def _require_at_least(path: str, value: int, least: int) -> None:
    _require(value >= least, path, value, f"a whole number of at least {least}")


def _require_positive(path: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, path, value, "a number above 0")
