"""The recorder replays what ran, and leaves torch as it was where that cannot be."""

import warnings

import pytest
import torch

from fp8kv.runtime.cuda_graphs import CudaRecorder, NotRecordable, _reason


def make_recorder(min_free_bytes=0):
    return CudaRecorder(torch.device("cuda"), min_free_bytes=min_free_bytes)


def doubling():
    source, result = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")

    def run():
        result.copy_(source * 2)

    return source, result, run


@pytest.mark.gpu
def test_what_is_recorded_runs_when_it_is_replayed():
    recorder = make_recorder()
    source, result, run = doubling()
    recorder.rehearse(run)
    assert result.tolist() == [2.0] * 4
    result.zero_()
    replay = recorder.record(run)
    assert result.tolist() == [0.0] * 4
    source.fill_(5.0)
    replay()
    assert result.tolist() == [10.0] * 4


@pytest.mark.gpu
def test_graphs_of_one_pool_do_not_disturb_each_other():
    recorder = make_recorder()
    pairs = []
    for _ in range(3):
        source, result, run = doubling()
        recorder.rehearse(run)
        pairs.append((source, result, recorder.record(run)))
    for number, (source, _, _) in enumerate(pairs):
        source.fill_(number)
    for order in ((2, 0, 1), (1, 2, 0)):
        for number in order:
            pairs[number][1].zero_()
            pairs[number][2]()
        assert [result[0].item() for _, result, _ in pairs] == [0.0, 2.0, 4.0]


@pytest.mark.gpu
def test_a_wait_for_the_gpu_is_found_in_the_rehearsal():
    recorder = make_recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotRecordable, match="synchronizing"):
            recorder.rehearse(lambda: torch.ones(1, device="cuda").item())
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.ones(1, device="cuda").item() == 1.0


@pytest.mark.gpu
def test_a_capture_that_breaks_leaves_torch_as_it_was():
    recorder = make_recorder()
    stream = torch.cuda.current_stream()

    def run():
        torch.ones(1 << 20, device="cuda")
        # of this torch's debug mode knows nothing
        torch.cuda.synchronize()

    recorder.rehearse(run)
    with pytest.raises(NotRecordable, match="captur"):
        recorder.record(run)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.rand(3, device="cuda").isfinite().all()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    block = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() > before
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.gpu
def test_without_free_memory_nothing_is_recorded():
    recorder = make_recorder(min_free_bytes=1 << 50)
    _, _, run = doubling()
    recorder.rehearse(run)
    assert recorder.record(run) is None


def test_the_reason_is_what_went_wrong_first():
    first, last = ValueError("the first\nwith a second line"), RuntimeError("no end")
    last.__context__ = first
    assert _reason(last) == "the first"
