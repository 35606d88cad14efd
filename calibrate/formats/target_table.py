"""The table of serving engines, ``targets.yaml``, as typed data.

The format of the table, and the source of every fact, stand in ``targets.yaml`` itself.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import yaml

Effect = Literal["loads", "ignored", "breaks"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Case:
    """What the rules of a target ask about: a checkpoint and the scales that are to go into it.

    Attributes:
        attention: ``gqa`` or ``mla``.
        quant_method: of the checkpoint, ``none`` if it is not quantised.
        model_type: of the text model.
        granularity: ``tensor`` or ``head``.
        fp8_format: a key of :data:`fp8kv.kernels.fp8.FORMATS`.
        has_scheme: whether the checkpoint's quantisation config already has a ``kv_cache_scheme``.
    """

    attention: str
    quant_method: str
    model_type: str
    granularity: str = "tensor"
    fp8_format: str = "e4m3fn"
    has_scheme: bool = False


@dataclass(frozen=True)
class When:
    """The condition of a rule; a field that is None does not matter."""

    attention: str | None = None
    quant_method: tuple[str, ...] | None = None
    model_type: tuple[str, ...] | None = None
    granularity: str | None = None
    fp8_format: tuple[str, ...] | None = None
    has_scheme: bool | None = None

    def holds(self, case: Case) -> bool:
        """Tell whether every condition of the rule is met by ``case``."""
        for condition in fields(self):
            wanted, found = getattr(self, condition.name), getattr(case, condition.name)
            if wanted is None:
                continue
            if found not in wanted if isinstance(wanted, tuple) else found != wanted:
                return False
        return True


@dataclass(frozen=True)
class EffectRule:
    """What the engine does with what fp8kv writes; ``reason`` continues "<engine> <version> ..."."""

    when: When
    effect: Effect
    reason: str
    source: str


@dataclass(frozen=True)
class NamesRule:
    """Which spellings to write for the engine, which it loads (any one is enough), and which do harm."""

    when: When
    write: tuple[str, ...]
    load: tuple[str, ...]
    harmful: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigRule:
    """What the quantisation config must say before the engine looks for scales; ``instead`` is as good."""

    when: When
    set: Mapping[str, Any]
    instead: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ForbidRule:
    """Keys that must not be added to the quantisation config for another target."""

    when: When
    keys: tuple[str, ...]
    reason: str
    source: str


@dataclass(frozen=True)
class FilesRule:
    """JSON files beside ``config.json``: to create, or to edit where the source has them."""

    when: When
    create: Mapping[str, Any] = field(default_factory=dict)
    edit: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServeRule:
    """The command that serves the result; ``{model}`` stands for the directory."""

    when: When
    command: str


@dataclass(frozen=True)
class Target:
    """One version of one engine (or file format), as a table of facts.

    Attributes:
        name: what ``--target`` takes.
        engine: its name in sentences.
        version: the version that the facts are about.
        date: the day they were established.
    """

    name: str
    engine: str
    version: str
    date: datetime.date
    effects: tuple[EffectRule, ...]
    names: tuple[NamesRule, ...]
    config: tuple[ConfigRule, ...]
    serve: tuple[ServeRule, ...]
    forbid: tuple[ForbidRule, ...] = ()
    files: tuple[FilesRule, ...] = ()


@dataclass(frozen=True)
class Base:
    """Whether scales can be added to checkpoints of one ``quant_method``, and if not, why."""

    writable: bool
    reason: str = ""
    source: str = ""


@dataclass(frozen=True)
class Spelling:
    """One name under which a scale is stored, and its shape for one scale per layer."""

    tensor: str
    shape: tuple[int, ...]

    def name(self, layer: str, stream: str) -> str:
        """Return the tensor name of ``stream`` (``k`` or ``v``) of the attention module ``layer``."""
        return self.tensor.format(layer=layer, stream=stream)


@dataclass(frozen=True)
class Table:
    """The whole of ``targets.yaml``."""

    targets: Mapping[str, Target]
    bases: Mapping[str, Base]
    spellings: Mapping[str, Spelling]


@functools.cache
def load_table() -> Table:
    """Return the table that ships with fp8kv; it is immutable, so one copy serves all."""
    text = (resources.files(__package__) / "targets.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    return Table(
        targets=_freeze({name: _target(name, raw) for name, raw in content["targets"].items()}),
        bases=_freeze({name: Base(**raw) for name, raw in content["bases"].items()}),
        spellings=_freeze(
            {
                name: Spelling(raw["tensor"], tuple(raw["shape"]))
                for name, raw in content["spellings"].items()
            }
        ),
    )


def _target(name: str, raw: Mapping[str, Any]) -> Target:
    return Target(
        name=name,
        engine=raw["engine"],
        version=raw["version"],
        date=raw["date"],
        effects=tuple(EffectRule(**_rule(rule)) for rule in raw["effects"]),
        names=tuple(NamesRule(**_rule(rule)) for rule in raw["names"]),
        config=tuple(ConfigRule(**_rule(rule)) for rule in raw["config"]),
        serve=tuple(ServeRule(**_rule(rule)) for rule in raw["serve"]),
        forbid=tuple(ForbidRule(**_rule(rule)) for rule in raw.get("forbid", [])),
        files=tuple(FilesRule(**_rule(rule)) for rule in raw.get("files", [])),
    )


def _rule(raw: Mapping[str, Any]) -> dict[str, Any]:
    when = When(**{key: _tuple(value) for key, value in raw["when"].items()})
    return {"when": when} | {key: _tuple(value) for key, value in raw.items() if key != "when"}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _freeze(values: dict[str, _Value]) -> Mapping[str, _Value]:
    return MappingProxyType(values)
