"""The kernels' benchmarks: what they count, how they choose, how they survive a kernel that does not, and the tables."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "benchmarks" / "results" / "peers-h200.json"
KERNELS = [
    "quantize",
    "cache_write",
    "mla_pack",
    "mla_pack_kv",
    "rope_quantize",
    "rope_cache_write",
    "gather",
    "decode_gqa",
    "decode_mla",
    "extend",
]


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    """The benchmarks are no part of the installed package; they are run at the root of the repository."""
    monkeypatch.syspath_prepend(str(ROOT))


def harness(name):
    return importlib.import_module(f"benchmarks.kernels.{name}")


def peers():
    return json.loads(PEERS.read_text())


def ceilings():
    return harness("case").Ceilings(
        copy_tbps=4.0, read_tbps=4.5, bf16_tflops=800.0, graph_node_us=0.7
    )


def case_of(**changes):
    fields = {"kernel": "quantize", "shape": "s", "bytes": 4_000_000, "flops": 0}
    return harness("case").Case(**fields | {"build": None, "copy_bytes": 4_000_000} | changes)


# --- shapes and floors


def test_the_documentation_shows_what_the_committed_results_say():
    table = harness("table")
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert table.with_tables(page, table.newest_results(), peers()) == page
    assert page.count("made by table.py") == len(KERNELS) + 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_of_the_peers_is_timed_and_its_floor_is_theirs(kernel):
    ours = {case.shape: case for case in harness(kernel).cases()}
    theirs = [shape for shape in peers()["shapes"] if shape["kernel"] == kernel]
    assert bool(theirs) == (kernel not in ("mla_pack_kv", "rope_quantize", "rope_cache_write"))
    for shape in theirs:
        case = ours[shape["shape"]]
        assert (case.bytes, case.flops) == (shape["bytes"], shape["flops"]), shape["shape"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes_are_named_once_and_belong_to_their_module(kernel):
    cases = harness(kernel).cases()
    assert len({case.shape for case in cases}) == len(cases)
    assert {case.kernel for case in cases} == {kernel}
    assert any(case.target is not None for case in cases) == (kernel != "mla_pack_kv")


@pytest.mark.parametrize(
    ("kernel", "shape", "target"),
    [
        ("decode_gqa", "48/8 B64 L8K", "93 %"),
        ("decode_gqa", "32/8 B1 L192K", "93 %"),
        ("decode_gqa", "48/8 B1 L32K", "24 us"),
        ("decode_gqa", "8/1 B64 L8K", "None"),
        ("decode_mla", "H16 B64 L8K", "78 %"),
        ("decode_mla", "H16 B16 L8K", "None"),
        ("decode_mla", "H64 B16 L8K", "60 %"),
        ("decode_mla", "H128 B1 L192K", "110 us"),
        ("cache_write", "8x128 K+V T64", "2.1 us"),
        ("mla_pack", "MLA576 T1024", "None"),
        ("quantize", "64x576", "1.8 us"),
        ("gather", "64x4K MLA576", "92 %"),
        ("extend", "48/8 1x(0+8K)", "400 TFLOP/s"),
    ],
)
def test_targets_stand_at_their_shapes(kernel, shape, target):
    cases = {case.shape: case for case in harness(kernel).cases()}
    assert str(cases[shape].target) == target


def test_the_larger_of_two_floors_counts():
    memory = case_of(flops=1000)
    matrix = case_of(flops=8_000_000_000)
    assert (memory.floor_us(ceilings()), memory.bound(ceilings())) == (1.0, "mem")
    assert (matrix.floor_us(ceilings()), matrix.bound(ceilings())) == (10.0, "mma")


def test_a_target_becomes_a_time():
    target = harness("case").Target
    assert target(time_us=24).as_time_us(15.0, 0) == 24
    assert target(fraction=0.5).as_time_us(15.0, 0) == 30
    assert target(tflops=400).as_time_us(15.0, 400_000_000) == pytest.approx(1.0)


# --- timing and data


@pytest.mark.parametrize(
    ("size", "copies"), [(4_000, 64), (40_000_000, 20), (4_000_000_000, 1), (20 << 30, 1)]
)
def test_small_problems_are_repeated_until_they_can_be_timed(size, copies):
    case = case_of(bytes=size, copy_bytes=size)
    assert harness("timing").choose_copies(case, ceilings()) == copies


def test_copies_fit_into_memory():
    case = case_of(bytes=4_000, copy_bytes=3 << 30)
    assert harness("timing").choose_copies(case, ceilings()) == 4


def test_every_page_is_used_once_and_in_no_order():
    tables, count = harness("problems").page_tables(2, 3, 100, 16, device="cpu")
    assert tables.shape == (2, 3, 7)
    assert tables.flatten().sort().values.tolist() == list(range(count))
    assert tables.flatten().tolist() != list(range(count))


def test_slots_are_distinct():
    slots = harness("problems").slots(3, 5, 64, device="cpu")
    assert slots.shape == (3, 5)
    assert len(set(slots.flatten().tolist())) == 15


def test_codes_are_finite_normal_values_over_the_scale():
    codes = harness("problems").normal_codes((64, 16, 8), 0.0125, device="cpu")
    values = codes.float() * 0.0125
    assert values.isfinite().all()
    assert values.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (2, [0, 1]), (64, [0, 21, 42, 63])])
def test_the_first_and_the_last_sequence_are_compared(count, chosen):
    assert harness("problems").some(count) == chosen


def test_errors_are_stated_as_the_page_says():
    import torch

    problems = harness("problems")
    ones = torch.ones(100)
    assert problems.relative_error(ones * 1.01, ones) == pytest.approx(0.01, rel=1e-4)
    codes = torch.zeros(100, dtype=torch.uint8)
    other = codes.clone()
    other[7] = 0x80  # -0.0, another code
    assert problems.differing_share(codes, other) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("kernel", "shape", "left"),
    [
        ("quantize", "64x576", 0.0),
        ("cache_write", "8x128 K+V T64", 0.0),
        ("mla_pack", "MLA576 T64", 0.0),
        ("mla_pack_kv", "128 heads T64", 0.0),
        ("rope_quantize", "48/8 d128 T64", 0.0),
        # Triton's interpreter cuts BF16 off, so that one in two rotated numbers differs
        ("rope_cache_write", "32/8 d128 T1", 0.55),
    ],
)
def test_problems_of_write_kernels_compare_with_the_reference(kernel, shape, left):
    case = next(case for case in harness(kernel).cases() if case.shape == shape)
    problem = case.build(2, False, "cpu")
    assert problem.error() > 0.9  # nothing is written yet
    for call in problem.calls:
        call()
    assert problem.error() <= left


# --- processes


@pytest.fixture
def worker(root_on_path):
    made = harness("workers").Worker()
    yield made
    made.stop()


def test_a_failing_job_costs_only_itself(worker):
    workers = harness("workers")
    worker.ask(workers.Job(workers.LIST, "no_such_kernel"))
    answer = worker.answer(120)
    assert "no_such_kernel" in answer.error
    worker.ask(workers.Job(workers.LIST, "quantize"))
    assert ("64x576", True) in worker.answer(120).value


def test_a_process_that_dies_or_hangs_is_given_up(worker):
    workers = harness("workers")
    hanging = workers.Worker()
    start = time.monotonic()
    assert hanging.answer(0.1) is None
    assert time.monotonic() - start < 10
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.answer(60) is None


def test_jobs_are_shared_out_and_late_ones_given_up(worker):
    workers = harness("workers")
    seen = {}
    jobs = [workers.Job(workers.LIST, kernel) for kernel in ("quantize", "no_such_kernel")]
    free = workers.share_out(
        [worker], jobs, time.monotonic() + 120, lambda job, answer: seen.update({job: answer})
    )
    assert free == [worker]
    assert seen[jobs[0]].error is None
    assert seen[jobs[1]].error is not None
    late = workers.share_out([worker], jobs, time.monotonic() - 1, lambda job, answer: seen.clear())
    assert late == [worker]
    assert len(seen) == 2


def test_without_a_gpu_there_are_no_times():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.run", "--out", "never.json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode != 0
    assert "These are times of a GPU" in finished.stderr
    assert not (ROOT / "never.json").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("goal", ["gpu-test", "bench"])
def test_make_says_that_a_gpu_is_missing(goal):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    finished = subprocess.run(
        ["make", "-s", goal, f"BIN_PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode != 0
    assert f"make {goal} needs a CUDA GPU" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_results_are_json_with_a_line_per_shape():
    text = harness("run")._as_json({"gpu": "g", "rows": [{"a": 1}, {"a": 2}], "failures": []})
    assert json.loads(text) == {"gpu": "g", "rows": [{"a": 1}, {"a": 2}], "failures": []}
    assert '  {"a": 1},\n  {"a": 2}\n' in text
