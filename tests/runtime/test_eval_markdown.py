"""The evaluation as Markdown: golden form, signs, and safe quoting."""

import dataclasses
import json
from pathlib import Path

from fp8kv.runtime.eval_markdown import to_markdown
from fp8kv.runtime.eval_report import EvalReport

GOLDEN = Path(__file__).parent / "golden"


def report() -> EvalReport:
    return EvalReport.from_json(json.loads((GOLDEN / "eval_report.json").read_text()))


def table_rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_has_the_golden_form() -> None:
    assert to_markdown(report()) == (GOLDEN / "eval_report.md").read_text()


def test_rows_have_as_many_cells_as_their_header() -> None:
    arm_table, pair_table = 2 + 3, 2 + 4
    rows = table_rows(to_markdown(report()))
    assert len(rows) == arm_table + pair_table
    assert {len(row) for row in rows} == {8}


def test_leaves_the_comparison_out_where_there_is_none() -> None:
    full = report()
    arms = {"fp8": dataclasses.replace(full.arms["fp8"], agreement=None)}
    markdown = to_markdown(dataclasses.replace(full, arms=arms, comparisons={}))
    assert "on the same problems" not in markdown
    assert table_rows(markdown)[2][3:] == ["-"] * 5


def test_names_no_shots_file_without_shots() -> None:
    markdown = to_markdown(dataclasses.replace(report(), num_fewshot=0, shots=None))
    assert "500 problems of `gsm-synth-test.jsonl`, 0-shot, greedy" in markdown


def test_keeps_the_sign_of_a_difference_and_shows_none_as_zero() -> None:
    differences = [row[2] for row in table_rows(to_markdown(report()))[7:]]
    assert differences[0] == "-6.60 [-9.00, -4.40]"
    assert differences[2:] == ["-0.20 [-1.00, +0.40]", "0.00 [0.00, 0.00]"]


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    full = report()
    tiny = dataclasses.replace(full.comparisons["fp8"].strict, difference=-1e-6, ci_high=1e-6)
    pair = dataclasses.replace(full.comparisons["fp8"], strict=tiny)
    markdown = to_markdown(dataclasses.replace(full, comparisons={"fp8": pair}))
    assert "| 0.00 [-1.00, 0.00] |" in markdown


def test_a_hostile_path_cannot_leave_its_code_span() -> None:
    hostile = dataclasses.replace(report(), model="a`b\n# c|d", data="x")
    assert to_markdown(hostile).splitlines()[0] == "### GSM8K by KV cache: `a'b # c|d`"
