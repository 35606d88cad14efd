r"""The protocol of the ``gsm8k`` task of lm-evaluation-harness: prompts, stops, filters, scores.

Reproduced is version 3.0 of the task as lm-evaluation-harness 0.4.13 runs it by default, without a
chat template, on one process:

- Prompt: ``Question: {question}\nAnswer:``. A shot is the same text, a space, its answer verbatim
  and a blank line.
- Shots: one ``random.Random(1234)`` serves the whole run. It is not seeded anew for a problem, so a
  prompt depends on its position, and a run over the first k problems has the full run's prompts.
- Shots from the evaluated split itself: one more is drawn, the problem is dropped, the surplus too.
  If copies of the problem leave too few, all are drawn anew from the pool without the problem.
- Generation: greedy, at most 256 new tokens, cut at ``Question:``, ``</s>``, ``<|im_end|>`` and at
  the tokenizer's own end-of-sequence text.
- Filters: ``strict-match`` takes the first number after ``#### ``, ``flexible-extract`` the last
  number anywhere; ``[invalid]`` where there is none.
- ``exact_match``: commas, dollar signs, all up to the last ``#### `` and one final full stop are
  removed, in this order, from both the extracted text and the reference answer; case is ignored.

One accident is left out: a reference answer that is a Python list literal, ``[...]``, is evaluated
by the harness, and its first element used. No GSM8K answer looks like that.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8kv.recipes.errors import DataError, EvaluationError

PROTOCOL = "gsm8k 3.0, lm-evaluation-harness 0.4.13"
NUM_FEWSHOT = 5
FEWSHOT_SEED = 1234
MAX_NEW_TOKENS = 256
STOPS = ("Question:", "</s>", "<|im_end|>")

_STRICT_PATTERN = r"#### (\-?[0-9\.\,]+)"
_FLEXIBLE_PATTERN = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
_IGNORED_PATTERNS = (",", r"\$", "(?s).*#### ", r"\.$")
_INVALID = "[invalid]"


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        question: the text after ``Question: ``.
        answer: the worked answer, which ends in ``#### `` and the number.
    """

    question: str
    answer: str


@dataclass(frozen=True)
class Score:
    """What the two filters made of one generated text.

    Attributes:
        strict: whether the ``strict-match`` answer is right.
        flexible: whether the ``flexible-extract`` answer is right.
        strict_answer: the text that ``strict-match`` extracted, before normalisation; None where
            the harness reports ``[invalid]``.
        flexible_answer: the same of ``flexible-extract``.
    """

    strict: bool
    flexible: bool
    strict_answer: str | None
    flexible_answer: str | None


def load_problems(path: str | Path) -> tuple[Problem, ...]:
    """Read the problems of a JSON Lines file, or of a JSON file that holds one array.

    The content decides which of the two it is, not the suffix. Keys other than ``question`` and
    ``answer`` are ignored.

    Raises:
        DataError: the file cannot be read, holds no problem, or one of its records is malformed;
            the message names the line (or the position in the array).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read problems from {path}: {error.strerror or error}") from None
    problems = tuple(_problem(record, where) for record, where in _records(content, path))
    if not problems:
        raise DataError(f"{path} holds no problems; give JSON Lines with 'question' and 'answer'")
    return problems


def question_prompt(problem: Problem) -> str:
    """Return the prompt of a problem without shots; it ends in ``Answer:``, without a space."""
    return f"Question: {problem.question}\nAnswer:"


def reference_continuation(problem: Problem) -> str:
    """Return the text that continues a prompt with the reference answer, its leading space too."""
    return f" {problem.answer}"


def build_prompts(
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    num_fewshot: int = NUM_FEWSHOT,
    *,
    same_split: bool = False,
) -> list[str]:
    """Build one prompt per problem, byte for byte those of the harness.

    Args:
        problems: what is asked, in the order of the data file: the shots depend on the order.
        shots: the pool that shots are drawn from, whole and in the order of its file.
        num_fewshot: shots per prompt; 0 gives the bare question.
        same_split: whether ``problems`` are (the first) records of the ``shots`` file. Then no
            problem is its own shot.

    Raises:
        DataError: the pool is too small.
        EvaluationError: ``num_fewshot`` is negative.
    """
    if num_fewshot < 0:
        raise EvaluationError(f"the number of shots is {num_fewshot}; give 0 or more")
    generator = random.Random(FEWSHOT_SEED)
    prompts = []
    for problem in problems:
        drawn = _draw_shots(generator, shots, num_fewshot, problem if same_split else None)
        solved = (f"{question_prompt(s)}{reference_continuation(s)}\n\n" for s in drawn)
        prompts.append("".join(solved) + question_prompt(problem))
    return prompts


def truncate_at_stop(text: str, stops: Iterable[str] = STOPS) -> str:
    """Cut a generated text at the stops, each taken out in turn; empty stops are ignored.

    The caller appends the end-of-sequence text of the tokenizer to the stops, as the harness does.
    """
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text


def score(generated: str, problem: Problem) -> Score:
    """Score a generated text, already cut by :func:`truncate_at_stop`, against the reference."""
    strict = re.findall(_STRICT_PATTERN, generated)
    flexible = re.findall(_FLEXIBLE_PATTERN, generated)
    strict_answer = strict[0] if strict else None
    # A match is in one of the two groups; the other one is empty.
    flexible_answer = (flexible[-1][0] or flexible[-1][1]) if flexible else None
    return Score(
        strict=_exact_match(strict_answer, problem.answer),
        flexible=_exact_match(flexible_answer, problem.answer),
        strict_answer=strict_answer,
        flexible_answer=flexible_answer,
    )


def protocol_digest(
    prompts: Sequence[str],
    problems: Sequence[Problem],
    *,
    stops: Sequence[str] = STOPS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> str:
    """Hash everything about the protocol that shapes the numbers.

    Two results are comparable, problem by problem, if their digests agree: same prompts in the same
    order, same references, stops, token limit, filters and normalisation. Model, tokenizer and
    cache are not part of it.

    Args:
        prompts: what the model reads, one per problem.
        problems: the problems, for their reference answers.
        stops: the stop strings, the tokenizer's end-of-sequence text included if it is one.
        max_new_tokens: the generation limit.

    Returns:
        A SHA-256 in hexadecimal digits.

    Raises:
        EvaluationError: prompts and problems differ in number.
    """
    if len(prompts) != len(problems):
        raise EvaluationError(
            f"{len(prompts)} prompts do not belong to {len(problems)} problems; "
            "build the prompts from these problems"
        )
    content = {
        "protocol": PROTOCOL,
        "prompts": list(prompts),
        "references": [problem.answer for problem in problems],
        "stops": list(stops),
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
        "filters": {"strict-match": _STRICT_PATTERN, "flexible-extract": _FLEXIBLE_PATTERN},
        "ignored": list(_IGNORED_PATTERNS),
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _draw_shots(
    generator: random.Random, pool: Sequence[Problem], count: int, exclude: Problem | None
) -> Sequence[Problem]:
    if count == 0:
        return []
    needed = count if exclude is None else count + 1
    if len(pool) < needed:
        raise DataError(_too_few(needed, len(pool)))
    drawn = generator.sample(pool, needed)
    if exclude is None:
        return drawn
    kept = [shot for shot in drawn if shot != exclude][:count]
    if len(kept) == count:
        return kept
    others = [shot for shot in pool if shot != exclude]
    if len(others) < count:
        raise DataError(_too_few(count, len(others)))
    return generator.sample(others, count)


def _too_few(needed: int, found: int) -> str:
    return (
        f"a prompt needs {needed} different problems to draw its shots from, but there are {found}; "
        "give a larger shots file or fewer shots"
    )


def _exact_match(extracted: str | None, reference: str) -> bool:
    return _normalise(_INVALID if extracted is None else extracted) == _normalise(reference)


def _normalise(text: str) -> str:
    for pattern in _IGNORED_PATTERNS:
        text = re.sub(pattern, "", text)
    return text.lower()


def _records(content: bytes, path: Path) -> Iterator[tuple[Any, str]]:
    """Yield each record of a file with the words that say where it stands."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not UTF-8 text; problems are read from JSON Lines or JSON, so convert it first"
        ) from None
    if text.lstrip().startswith("["):
        for position, record in enumerate(_parse(text, str(path)), start=1):
            yield record, f"record {position} of {path}"
        return
    # Not splitlines(): it also splits at separators that JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            yield _parse(line, where), where


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno} "
        reason = f"{error.msg} at {line}column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise DataError(f"{where} is not valid JSON ({reason}); is the file cut off?")


def _problem(record: Any, where: str) -> Problem:
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object with 'question' and 'answer'")
    for key in ("question", "answer"):
        if key not in record:
            found = ", ".join(repr(name) for name in record) or "nothing"
            raise DataError(f"{where} has no {key!r}, only {found}; rename the columns")
        value = record[key]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {key!r} is not a text with content; correct or remove it")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{where}: {key!r} holds half a surrogate pair; correct the encoding")
    return Problem(record["question"], record["answer"])
