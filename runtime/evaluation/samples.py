"""The log of generated answers: one JSON line each, and the means to go on after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fp8kv.recipes.errors import EvaluationError, OutputError

_LINE_START = b'{"run": "'
"""What every line begins with: a file that does not is somebody else's, and is left as it is."""


class SampleLog:
    """An append-only JSON Lines file of generated texts.

    Each line holds ``run``, ``arm``, ``index``, ``prompt_sha256`` and ``text``. A run that is started again with
    the same file goes on where it stopped.
    """

    def __init__(self, path: Path, run: str) -> None:
        """Open the log.

        Args:
            path: the file; it may exist.
            run: digest of what shapes the answers (checkpoint, protocol, dtype, scales).

        Raises:
            EvaluationError: the file holds answers of another run, or a line that is not of this form.
            OutputError: the file cannot be read.
        """
        self._path = path
        self._run = run
        self._texts: dict[tuple[str, int, str], str] = {}
        if path.exists():
            self._read()

    def known(self, arm: str, prompts: Sequence[str]) -> dict[int, str]:
        """Return the texts that the file already holds for these prompts, by index."""
        found = {}
        for index, prompt in enumerate(prompts):
            text = self._texts.get((arm, index, _digest(prompt)))
            if text is not None:
                found[index] = text
        return found

    def append(self, arm: str, index: int, prompt: str, text: str) -> None:
        """Add one answer; it is on disk when this returns, but for the operating system's own buffer.

        Raises:
            OutputError: the file cannot be written.
        """
        line = {
            "run": self._run,
            "arm": arm,
            "index": index,
            "prompt_sha256": _digest(prompt),
            "text": text,
        }
        try:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}") from error

    def _read(self) -> None:
        try:
            raw = self._path.read_bytes()
        except OSError as error:
            raise OutputError(f"cannot read {self._path}: {error.strerror or error}") from error
        complete, _, broken = raw.rpartition(b"\n")
        lines = complete.decode("utf-8", "replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                run = entry["run"]
                key = (str(entry["arm"]), int(entry["index"]), str(entry["prompt_sha256"]))
                text = str(entry["text"])
            except (ValueError, KeyError, TypeError):
                raise self._foreign(number) from None
            if run != self._run:
                raise EvaluationError(
                    f"{self._path} holds answers of another run (other checkpoint, protocol, dtype or scales); "
                    "name another file or delete it"
                )
            self._texts[key] = text
        if not broken:
            return
        if not (broken.startswith(_LINE_START) or _LINE_START.startswith(broken)):
            raise self._foreign(len(lines) + 1)
        # a kill in the middle of a write leaves a last line without its end: that answer is made again
        self._path.write_bytes(complete + b"\n" if complete else b"")

    def _foreign(self, number: int) -> EvaluationError:
        return EvaluationError(
            f"{self._path}, line {number}, is not an answer that fp8kv eval wrote; name another file"
        )


def check_writable(path: Path) -> None:
    """Refuse, before anything is computed, a log that could not be written; where it is missing, make it.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.open("a").close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
