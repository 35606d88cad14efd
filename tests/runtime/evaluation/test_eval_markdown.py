"""The evaluation as Markdown: golden form, whole rows, and what is left out."""

import dataclasses
import json
from pathlib import Path

import pytest

from fp8kv.runtime.evaluation.eval_markdown import to_markdown
from fp8kv.runtime.evaluation.eval_report import EvalReport, Sections

GOLDEN = Path(__file__).parent / "golden"
TITLES = {
    "gsm8k": "**GSM8K.**",
    "perplexity": "**Perplexity.**",
    "agreement": "**Agreement.**",
    "needle": "**Needles.**",
    "tasks": "**Tasks**",
}


def report():
    return EvalReport.from_json(json.loads((GOLDEN / "eval_report.json").read_text()))


def tables(markdown):
    """Return every table as a list of rows of cells."""
    found = []
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            found.append([line.strip("| ").split(" | ") for line in block.splitlines()])
    return found


def test_has_the_golden_form():
    assert to_markdown(report()) == (GOLDEN / "eval_report.md").read_text()


def test_rows_have_as_many_cells_as_their_header():
    found = tables(to_markdown(report()))
    assert len(found) == 8
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}


@pytest.mark.parametrize("name", list(TITLES))
def test_says_what_was_measured_and_nothing_else(name):
    full = report()
    sections = Sections(**{name: getattr(full.sections, name)})
    markdown = to_markdown(dataclasses.replace(full, sections=sections, expectations=()))
    assert [other for other, title in TITLES.items() if title in markdown] == [name]
    assert "Expected" not in markdown


def test_leaves_the_comparison_out_where_there_is_none():
    full = report()
    arms = {"fp8": dataclasses.replace(full.sections.gsm8k.arms["fp8"], agreement=None)}
    gsm8k = dataclasses.replace(full.sections.gsm8k, arms=arms, comparisons={})
    alone = dataclasses.replace(
        full, arms={"fp8": full.arms["fp8"]}, sections=Sections(gsm8k=gsm8k), expectations=()
    )
    (table,) = tables(to_markdown(alone))
    assert table[2][3:] == ["-"] * 5


def test_names_no_shots_file_without_shots():
    full = report()
    gsm8k = dataclasses.replace(full.sections.gsm8k, num_fewshot=0, shots=None)
    markdown = to_markdown(dataclasses.replace(full, sections=Sections(gsm8k=gsm8k)))
    assert "500 problems of `gsm-synth-test.jsonl`, 0-shot, greedy" in markdown


def test_an_expectation_that_is_missed_stands_out():
    rows = tables(to_markdown(report()))[-1]
    assert [row[3] for row in rows[2:]] == ["met", "**not met**"]


def test_a_hostile_path_cannot_leave_its_code_span():
    hostile = dataclasses.replace(report(), model="a`b\n# c|d")
    assert to_markdown(hostile).splitlines()[0] == "### Accuracy by KV cache: `a'b # c|d`"
