"""The tables of the kernels' times: what is compared with what, and how misses are shown."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = "before\n<!-- decode_gqa: made by table.py -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.kernels.table")


def row(**changes):
    return {
        "kernel": "decode_gqa",
        "shape": "8/1 B1 L1K",
        "time_us": 10.0,
        "floor_us": 9.0,
        "fraction": 0.9,
        "bound": "mem",
        "error": 0.0017,
        "target": "12 us",
        "target_us": 12.0,
    } | changes


def peer(name, time_us, query="bf16", cache="fp8", error=0.002):
    return {"peer": name, "time_us": time_us, "query": query, "cache": cache, "error": error}


def made(table, rows, peers, failures=()):
    ours = {"rows": rows, "failures": list(failures)}
    theirs = {"shapes": [{"kernel": "decode_gqa", "shape": "8/1 B1 L1K", "peers": peers}]}
    return table.with_tables(PAGE, ours, theirs)


def test_where_the_matrix_unit_is_the_bound_its_rate_is_shown(table):
    page = made(table, [row(bound="mma", flops=5_000_000_000)], [])
    assert "| 90.0 % mma, 500 TFLOP/s |" in page
    assert "| 90.0 % mem |" in made(table, [row(bound="mem", flops=5_000_000_000)], [])


def test_no_cell_breaks_its_table(table):
    for kernel in importlib.import_module("benchmarks.kernels.workers").KERNELS:
        for case in importlib.import_module(f"benchmarks.kernels.{kernel}").cases():
            assert "|" not in case.shape


def test_only_what_is_between_the_markers_changes(table):
    page = made(table, [row()], [])
    assert page.startswith("before\n<!-- decode_gqa: made by table.py -->\n| shape")
    assert page.endswith("1 of 1 targets met.\n<!-- end -->\nafter\n")
    assert made(table, [row()], []) == page
    assert "old" not in page


def test_a_faster_peer_of_another_class_stands_apart_with_its_error(table):
    peers = [
        peer("Slow", 40.0),
        peer("Alike", 20.0),
        peer("Coarse", 5.0, query="fp8", error=0.04),
    ]
    page = made(table, [row()], peers)
    assert "| 20.0 Alike, 2.00x | 5.00 Coarse, **0.50x**, error 4.0e-2 |" in page
    assert "At none of the 1 shapes is a peer of the class faster." in page


def test_a_peer_that_keeps_the_cache_in_bf16_is_no_member_of_the_class(table):
    page = made(table, [row()], [peer("Dense", 5.0, cache="bf16", error=None), peer("Alike", 20.0)])
    assert "| 20.0 Alike, 2.00x | 5.00 Dense, **0.50x**, BF16 cache |" in page


def test_the_best_of_all_is_not_said_twice(table):
    page = made(table, [row()], [peer("Alike", 20.0), peer("Coarse", 30.0, query="fp8")])
    assert "| 20.0 Alike, 2.00x |  |" in page


def test_misses_are_shown(table):
    page = made(table, [row(time_us=13.0)], [peer("Alike", 12.0)])
    assert "12 us **missed**" in page
    assert "**0.92x**" in page
    assert "0 of 1 targets met. Slower than the best peer of the class at 8/1 B1 L1K." in page


@pytest.mark.parametrize(
    ("time_us", "target_us", "met"),
    [(1.804, 1.8, True), (1.806, 1.8, False), (540.4, 540.0, True), (541.0, 540.0, False)],
)
def test_a_target_is_met_to_the_digits_that_are_shown(table, time_us, target_us, met):
    assert table.is_met({"time_us": time_us, "target_us": target_us}) is met


def test_a_shape_without_a_target_is_not_counted(table):
    page = made(table, [row(target=None, target_us=None)], [])
    assert "targets met" not in page


def test_what_failed_is_listed_with_the_reason(table):
    failure = {"kernel": "decode_gqa", "shape": "8/1 B1 L8K", "why": "the process died"}
    assert "| 8/1 B1 L8K | not timed: the process died |" in made(table, [row()], [], [failure])


@pytest.mark.parametrize(
    ("kernel", "error", "alike"),
    [
        ("quantize", 0.0, True),
        ("quantize", 0.02, False),
        ("quantize", None, False),
        ("gather", 0.0016, True),
        ("gather", 0.0020, False),
    ],
)
def test_a_writer_is_in_the_class_when_its_codes_are_the_reference_s(table, kernel, error, alike):
    assert table.same_class(kernel, {"peer": "p", "time_us": 1.0, "error": error}) is alike


def test_numbers_have_three_digits(table):
    assert [table.number(value) for value in (0.5, 9.876, 98.76, 987.6)] == [
        "0.50",
        "9.88",
        "98.8",
        "988",
    ]
