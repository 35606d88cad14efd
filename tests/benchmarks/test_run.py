"""A run of the kernels' benchmarks, with workers that only pretend: what it writes, and what it survives."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [("first", True), ("hangs", False), ("spoils", False), ("fails", False), ("last", False)]
CEILINGS = {"copy_tbps": 4.123456, "read_tbps": 4.5, "bf16_tflops": 800.0, "graph_node_us": 0.7}


@pytest.fixture
def run(monkeypatch):
    """The module ``run`` without a GPU: its workers answer by the name of the shape."""
    monkeypatch.syspath_prepend(str(ROOT))
    run = importlib.import_module("benchmarks.kernels.run")
    workers = importlib.import_module("benchmarks.kernels.workers")
    answer = workers.Answer
    started = []

    class Pretender:
        def __init__(self):
            self.job, self.stopped = None, False
            started.append(self)

        def ask(self, job):
            assert not self.stopped
            self.job = job

        def answer(self, timeout):
            if self.job.action == workers.CEILINGS:
                return answer(run.Ceilings(**CEILINGS))
            assert self.job.ceilings is not None
            if self.job.shape == "hangs":
                self.stopped = True
                return None
            if self.job.shape == "spoils":
                self.stopped = True
                return answer(error="illegal address", is_last=True)
            if self.job.shape == "fails":
                return answer(error="KernelArgumentError: no")
            return answer(row(self.job.shape))

        def stop(self):
            self.stopped = True

    def share_out(free, jobs, until, report):
        for job in jobs:
            broken = job.kernel == "gather"
            listed = answer(error="ImportError: no") if broken else answer(SHAPES)
            report(job, listed if job.action == workers.LIST else answer())
        return free

    monkeypatch.setattr(run, "Worker", Pretender)
    monkeypatch.setattr(run, "share_out", share_out)
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda: "NVIDIA Abacus 9")
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("FP8KV_COMMIT", "0123abc")
    run.started = started
    return run


def row(shape):
    return {
        "kernel": "quantize",
        "shape": shape,
        "time_us": 10.0,
        "floor_us": 9.0,
        "fraction": 0.9,
        "bound": "mem",
        "error": 0.0,
        "target": "12 us",
        "target_us": 12.0,
    }


def test_a_lost_worker_costs_one_shape_and_the_run_goes_on(run, capsys):
    result = run.measure(["quantize"], quick=False, seconds=100)
    assert [found["shape"] for found in result["rows"]] == ["first", "last"]
    why = {failure["shape"]: failure["why"] for failure in result["failures"]}
    assert why["hangs"].startswith("the process died, or was silent")
    assert why["spoils"] == "illegal address"
    assert why["fails"] == "KernelArgumentError: no"
    assert all(worker.stopped for worker in run.started)
    assert "target 12 us met" in capsys.readouterr().out


def test_every_row_says_where_it_was_measured(run):
    result = run.measure(["quantize"], quick=False, seconds=100)
    for found in result["rows"]:
        assert (found["gpu"], found["commit"]) == ("NVIDIA Abacus 9", "0123abc")
        assert found["torch"] == run.torch.__version__
    assert result["ceilings"] == CEILINGS | {"copy_tbps": 4.1235}


def test_a_broken_kernel_breaks_only_itself(run):
    result = run.measure(["gather", "quantize"], quick=False, seconds=100)
    assert {"kernel": "gather", "shape": "all", "why": "ImportError: no"} in result["failures"]
    assert len(result["rows"]) == 2


def test_a_quick_run_takes_the_shapes_with_a_target(run):
    result = run.measure(["quantize"], quick=True, seconds=100)
    assert [found["shape"] for found in result["rows"]] == ["first"]
    assert result["failures"] == []


def test_when_the_time_is_over_the_rest_is_named(run):
    result = run.measure(["quantize"], quick=False, seconds=-1)
    assert result["rows"] == []
    assert result["ceilings"] is None
    assert [failure["why"] for failure in result["failures"]] == ["no time left"] * len(SHAPES)


def test_a_folder_gets_a_file_with_date_and_gpu(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["run", "--only", "quantize", "--quick", "--out", str(tmp_path)]
    )
    run.main()
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("-abacus-9-kernels.json")
    assert "nvidia" not in file.name
    assert json.loads(file.read_text())["rows"][0]["shape"] == "first"


def test_shapes_without_a_time_are_an_exit_status(run, monkeypatch, tmp_path):
    out = tmp_path / "made" / "here.json"
    monkeypatch.setattr("sys.argv", ["run", "--only", "quantize", "--out", str(out)])
    with pytest.raises(SystemExit, match="3 shapes have no time"):
        run.main()
    assert len(json.loads(out.read_text())["failures"]) == 3
