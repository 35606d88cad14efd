"""Where calibration text comes from: the description of one dataset, and its command-line form."""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8kv.recipes.errors import DataError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")

_DEFAULT_SPLIT = "train"
_OPTIONS = ("config", "split", "column", "weight")
_OPTION_START = re.compile(r",(?=\w+=)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """One dataset that calibration samples are drawn from.

    Attributes:
        dataset: path of a local file with one of :data:`DATA_SUFFIXES`, or a dataset's name on the
            Hugging Face hub, such as ``openai/gsm8k``.
        config: configuration of a hub dataset, such as ``main``; local files have none.
        split: split of a hub dataset; a local file is a single split and keeps the default.
        column: the column that holds the text or the messages; ``None`` recognises it.
        weight: share of the samples that this source gives, relative to the other sources.

    Raises:
        DataError: a name is empty, or the weight is not a positive finite number.
    """

    dataset: str
    config: str | None = None
    split: str = _DEFAULT_SPLIT
    column: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        for option in ("dataset", "config", "split", "column"):
            if getattr(self, option) == "":
                raise DataError(
                    f"dataset {self.dataset!r}: {option} is empty; name it or leave it out"
                )
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise DataError(
                f"dataset {self.dataset}: weight is {self.weight}; it must be a positive number"
            )


def parse_source(text: str) -> Source:
    """Parse the command-line form of a source: ``NAME_OR_PATH[,KEY=VALUE]...``.

    The keys are ``config``, ``split``, ``column`` and ``weight``. The name ends at the first comma
    that a word and ``=`` follow, and so does each value: other commas, and ``:``, ``@`` and ``=``,
    are part of the name or value. Examples: ``notes.txt``,
    ``data/train.jsonl,column=body,weight=2``, ``openai/gsm8k,config=main,split=train``.

    Raises:
        DataError: the name is empty; a key is unknown or given twice; or a value is not valid.
    """
    name, *options = _OPTION_START.split(text.strip())
    values: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _OPTIONS:
            raise DataError(
                f"dataset {name}: unknown option {key!r}{suggest(key, _OPTIONS)}; "
                f"known: {', '.join(_OPTIONS)}"
            )
        if key in values:
            raise DataError(f"dataset {name}: option {key} is given twice; keep one")
        values[key] = _number(name, value) if key == "weight" else value.strip()
    return Source(dataset=name.strip(), **values)


def local_file(source: Source) -> Path | None:
    """Return the file that ``source`` names, or ``None`` where it names a dataset on the hub.

    An existing path wins over a hub name. A name that looks like a path (a data suffix, a leading
    ``/``, ``./`` or ``~``, or more than one ``/``) is never looked up on the hub.

    Raises:
        DataError: the file is missing, is a directory or of an unknown kind, or a config or split
            is given for a local file; or the name can be neither a path nor a hub name.
    """
    name = source.dataset
    path = Path(os.path.expanduser(name))  # which leaves an unknown ~user as it is
    if os.path.isdir(path):
        raise DataError(f"dataset {name} is a directory; name one file in it{_files_in(path)}")
    if not os.path.exists(path):
        if path.suffix.lower() in DATA_SUFFIXES or name.startswith(("/", "./", "../", "~")):
            raise DataError(
                f"dataset file {name} does not exist; check the path{_comma_hint(name)}"
            )
        if not _HUB_NAME.fullmatch(name):
            raise DataError(
                f"dataset {name} is neither a file nor a name on the Hugging Face hub (OWNER/NAME)"
                + _comma_hint(name)
            )
        return None
    if path.suffix.lower() not in DATA_SUFFIXES:
        raise DataError(
            f"dataset file {name} is of an unknown kind; name it by what it holds: "
            f"{', '.join(DATA_SUFFIXES)}"
        )
    if source.config is not None or source.split != _DEFAULT_SPLIT:
        option = "config" if source.config is not None else "split"
        raise DataError(
            f"dataset {name} is a local file, which has no configs or splits; leave out {option}="
        )
    return path


def suggest(word: str, known: tuple[str, ...]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word nearest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise DataError(
            f"dataset {name}: weight is {value!r}; it must be a positive number"
        ) from None


def _files_in(directory: Path) -> str:
    try:
        names = sorted(p.name for p in directory.iterdir() if p.suffix.lower() in DATA_SUFFIXES)
    except OSError:
        names = []
    return f", such as {directory / names[0]}" if names else f" ({', '.join(DATA_SUFFIXES)})"


def _comma_hint(name: str) -> str:
    return "; options are written ,KEY=VALUE" if "," in name else ""
