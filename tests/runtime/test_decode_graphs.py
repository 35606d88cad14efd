"""Recorded decode steps give what the model gives, whatever is replayed, padded, dropped or refused."""

import logging
from types import SimpleNamespace

import pytest
import torch

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling.load import load_model
from fp8kv.calibrate.modeling.tap import find_attention_modules
from fp8kv.runtime.backends import choose_backend
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.cuda_graphs import NotRecordable
from fp8kv.runtime.decode_graphs import DecodeGraphs, round_up_length, round_up_sequences
from fp8kv.runtime.model_runner import ModelRunner
from fp8kv.runtime.paged_cache import build_cache, measure_dims

PAGE_SIZE = 16
PAGES = 48
VOCABULARY = 5


class FakeRecorder:
    """Keeps functions where the real one keeps graphs."""

    def __init__(self):
        self.rehearsed = self.recorded = self.replayed = 0
        self.refuses_at = None
        self.is_full = False

    def rehearse(self, run):
        if self.refuses_at == "rehearse":
            raise NotRecordable("it waits")
        self.rehearsed += 1
        run()

    def record(self, run):
        if self.refuses_at == "record":
            raise NotRecordable("it breaks")
        if self.is_full:
            return None
        self.recorded += 1

        def replay():
            self.replayed += 1
            run()

        return replay


class FakeRunner:
    """Answers with the positions of the tokens, and keeps copies of the batches that it saw."""

    def __init__(self):
        page = torch.zeros(1)
        self.cache = SimpleNamespace(layers={"a": SimpleNamespace(k=page)}, page_size=PAGE_SIZE)
        self.seen = []
        self.error = None

    def forward(self, batch):
        if self.error is not None:
            raise self.error
        names = ("token_ids", "positions", "slots", "prefix_lens", "seq_lens", "page_table")
        self.seen.append(
            SimpleNamespace(**{name: getattr(batch, name).tolist() for name in names}, batch=batch)
        )
        return batch.positions[:, None] + torch.arange(VOCABULARY) / 8


def decode(*lengths, new=1):
    """Return a batch of sequences of these lengths, each in pages of its own."""
    sequences, free = [], list(range(PAGES))[::-1]
    for number, length in enumerate(lengths):
        count = -(-length // PAGE_SIZE)
        sequences.append(([number + 1] * new, length - new, free[:count]))
        free = free[count:]
    return make_batch(sequences, PAGE_SIZE, "cpu")


def make_graphs(runner=None, recorder=None, *, max_sequences=20, max_seq_len=1000, **options):
    return DecodeGraphs(
        runner or FakeRunner(),
        max_sequences=max_sequences,
        max_seq_len=max_seq_len,
        recorder=recorder or FakeRecorder(),
        **options,
    )


@pytest.mark.parametrize(
    ("count", "rows"),
    [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (24, 24), (57, 64), (65, 80), (97, 100)],
)
def test_batches_are_padded_to_few_sizes(count, rows):
    assert round_up_sequences(count, 100) == rows


def test_a_single_seat_has_a_single_row():
    assert round_up_sequences(1, 1) == 1
    assert round_up_sequences(3, 3) == 3


@pytest.mark.parametrize(
    ("length", "bound"), [(1, 256), (256, 256), (257, 512), (4160, 8192), (8193, 9000)]
)
def test_lengths_are_bounded_by_powers_of_two(length, bound):
    assert round_up_length(length, 9000) == bound


def test_the_first_batch_of_a_kind_runs_the_second_is_recorded_and_all_others_are_replayed():
    recorder = FakeRecorder()
    graphs = make_graphs(recorder=recorder)
    for lengths in ((5, 20), (6, 21), (7, 200), (8, 9)):
        logits = graphs.forward(decode(*lengths))
        assert logits[:, 0].tolist() == [length - 1 for length in lengths]
    assert (recorder.rehearsed, recorder.recorded, recorder.replayed) == (1, 1, 3)
    assert graphs.num_graphs == 1


def test_other_sizes_and_longer_sequences_get_graphs_of_their_own():
    recorder = FakeRecorder()
    graphs = make_graphs(recorder=recorder)
    for lengths in ((5,), (5, 6), (5, 300), (5, 6, 7)):
        for _ in range(2):
            graphs.forward(decode(*lengths))
    assert recorder.recorded == graphs.num_graphs == 4


def test_what_pads_a_batch_has_no_length_and_no_slot():
    runner = FakeRunner()
    graphs = make_graphs(runner)
    # rows 5 to 8 of the first are in the way of the second's padding
    graphs.forward(decode(*range(33, 41)))
    logits = graphs.forward(decode(20, 30, 40, 50, 60))

    (seen,) = runner.seen[1:]
    assert logits.shape == (5, VOCABULARY)
    assert seen.seq_lens == [20, 30, 40, 50, 60, 0, 0, 0]
    assert seen.prefix_lens == [19, 29, 39, 49, 59, 0, 0, 0]
    assert seen.slots[5:] == [-1] * 3
    assert seen.token_ids == [1, 2, 3, 4, 5, 0, 0, 0]
    assert seen.positions[5:] == [0] * 3
    expected = decode(20, 30, 40, 50, 60)
    assert seen.slots[:5] == expected.slots.tolist()
    for row, pages in enumerate(expected.page_table.tolist()):
        held = -(-seen.seq_lens[row] // PAGE_SIZE)
        assert seen.page_table[row][:held] == pages[:held]


def test_a_padded_batch_is_a_decode_batch_of_the_bounds_that_it_is_recorded_for():
    runner = FakeRunner()
    make_graphs(runner).forward(decode(300, 5, 6))
    batch = runner.seen[0].batch
    assert batch.is_decode
    assert (batch.num_sequences, batch.num_tokens) == (4, 4)
    assert batch.cu_seqlens.tolist() == [0, 1, 2, 3, 4]
    assert (batch.max_new_tokens, batch.max_prefix_len, batch.max_seq_len) == (1, 511, 512)
    assert batch.page_table.shape == (4, 512 // PAGE_SIZE)


def test_graphs_that_were_not_used_for_longest_are_dropped():
    recorder = FakeRecorder()
    graphs = make_graphs(recorder=recorder, max_graphs=2)
    one, two, four = decode(5), decode(5, 6), decode(5, 6, 7)
    for batch in (one, one, two, two, one, four, four):
        graphs.forward(batch)
    assert (graphs.num_graphs, recorder.recorded) == (2, 3)
    graphs.forward(one)
    assert recorder.recorded == 3
    graphs.forward(two)
    assert (graphs.num_graphs, recorder.recorded, recorder.rehearsed) == (2, 4, 3)


@pytest.mark.parametrize("place", ["rehearse", "record"])
def test_what_cannot_be_recorded_is_said_once_and_runs_as_it_is(place, caplog):
    runner, recorder = FakeRunner(), FakeRecorder()
    recorder.refuses_at = place
    graphs = make_graphs(runner, recorder)
    with caplog.at_level(logging.WARNING):
        for length in (5, 6, 7, 8):
            assert graphs.forward(decode(length))[0, 0] == length - 1
    (record,) = caplog.records
    assert "without CUDA graphs" in record.getMessage()
    assert "it waits" in record.getMessage() or "it breaks" in record.getMessage()
    assert graphs.num_graphs == recorder.recorded == 0
    # unpadded, because nobody replays it
    assert runner.seen[-1].batch.max_seq_len == 8


def test_an_error_of_the_model_itself_is_raised_and_changes_nothing(caplog):
    runner, recorder = FakeRunner(), FakeRecorder()
    recorder.refuses_at, runner.error = "rehearse", RuntimeError("the model broke")
    graphs = make_graphs(runner, recorder)
    with pytest.raises(RuntimeError, match="the model broke"):
        graphs.forward(decode(5))
    recorder.refuses_at = runner.error = None
    for _ in range(2):
        graphs.forward(decode(5))
    assert graphs.num_graphs == 1
    assert not caplog.records


def test_without_room_for_a_graph_batches_run_as_they_are():
    recorder = FakeRecorder()
    graphs = make_graphs(recorder=recorder)
    for length in (5, 6):
        graphs.forward(decode(length))
    recorder.is_full = True
    for length in (5, 6, 7):
        assert graphs.forward(decode(length, length))[1, 0] == length - 1
    assert graphs.num_graphs == 1
    assert graphs.forward(decode(9))[0, 0] == 8
    assert recorder.replayed == 2


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (decode(5, 6, new=2), {}),
        (decode(5, 6, 7), {"max_sequences": 2}),
        (decode(300), {"max_seq_len": 299}),
        (decode(5), {"enabled": False}),
    ],
)
def test_other_batches_go_through_as_they_are(batch, options):
    runner, recorder = FakeRunner(), FakeRecorder()
    graphs = make_graphs(runner, recorder, **options)
    for _ in range(3):
        graphs.forward(batch)
    assert all(seen.batch is batch for seen in runner.seen)
    assert recorder.rehearsed == graphs.num_graphs == 0


def test_on_a_cpu_nothing_is_recorded():
    runner = FakeRunner()
    graphs = DecodeGraphs(runner, max_sequences=4, max_seq_len=100)
    batch = decode(5)
    for _ in range(3):
        graphs.forward(batch)
    assert all(seen.batch is batch for seen in runner.seen)


def test_closed_graphs_are_a_way_through():
    runner = FakeRunner()
    graphs = make_graphs(runner)
    batch = decode(5)
    graphs.forward(batch)
    graphs.forward(batch)
    graphs.close()
    assert graphs.num_graphs == 0
    assert graphs.forward(batch).shape == (1, VOCABULARY)
    assert runner.seen[-1].batch is batch


def make_runner(model, mode, backend):
    modules = find_attention_modules(model)
    cache = build_cache(
        modules,
        measure_dims(model, modules),
        mode=mode,
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        device=next(model.parameters()).device,
        scales=None,
    )
    for layer in cache.layers.values():
        for pages in (layer.k, layer.v):
            if pages is not None:
                # 0x7F is the code of NaN, and four of them a NaN of float32: what nobody wrote shows where it is read
                pages.view(torch.uint8).fill_(0x7F)
    return ModelRunner(model, cache, backend)


TEXTS = torch.randint(3, 200, (5, 60), generator=torch.Generator().manual_seed(1)).tolist()
PAGE_LISTS = torch.randperm(PAGES, generator=torch.Generator().manual_seed(2)).view(8, 6).tolist()
# who decodes in each step: batches grow, shrink and come back, and change their rows
STEPS = (
    (0, 1, 2, 3, 4),
    (4, 0, 2),
    (1,),
    (0, 1, 2, 3, 4),
    (2, 0, 4),
    (3,),
    (1, 3, 0),
    (4, 2, 1, 3, 0),
)


def run_steps(runner, forward, device):
    """Return the logits of every decode step, and all that lies in the cache at the end."""
    done = [11, 17, 16, 5, 33]
    prompts = [(TEXTS[n][:length], 0, PAGE_LISTS[n]) for n, length in enumerate(done)]
    runner.forward(make_batch(prompts, PAGE_SIZE, device))
    logits = []
    for rows in STEPS:
        sequences = [([TEXTS[row][done[row]]], done[row], PAGE_LISTS[row]) for row in rows]
        logits.append(forward(make_batch(sequences, PAGE_SIZE, device)).clone())
        for row in rows:
            done[row] += 1
    held = [
        pages.view(torch.uint8).clone()
        for layer in runner.cache.layers.values()
        for pages in (layer.k, layer.v)
        if pages is not None
    ]
    return logits, held


@pytest.mark.parametrize("model_type", ["llama", "minimax_m2", "deepseek_v3"])
def test_a_model_decodes_the_same_in_padded_batches(tiny_checkpoint, load, model_type):
    model = load(tiny_checkpoint(model_type)).model
    backend = choose_backend("reference", "cpu")
    with make_runner(model, "float32", backend) as runner:
        expected, held = run_steps(runner, runner.forward, "cpu")
    recorder = FakeRecorder()
    with make_runner(model, "float32", backend) as runner:
        graphs = make_graphs(runner, recorder, max_sequences=8, max_seq_len=96)
        found, held_too = run_steps(runner, graphs.forward, "cpu")
    assert recorder.replayed == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(held_too, held, strict=True):
        # NaN where nobody wrote: padding wrote nowhere
        torch.testing.assert_close(
            one.view(torch.float32), other.view(torch.float32), rtol=1e-4, atol=1e-5, equal_nan=True
        )


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "minimax_m2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("mode", ["bf16", "fp8-unit"])
def test_graphs_of_a_gpu_give_the_logits_of_the_model(tiny_checkpoint, model_type, mode):
    checkpoint = open_checkpoint(tiny_checkpoint(model_type))
    model = load_model(checkpoint, dtype=torch.bfloat16, device="cuda")
    backend = choose_backend(None, "cuda")
    with make_runner(model, mode, backend) as runner:
        expected, held = run_steps(runner, runner.forward, "cuda")
    with make_runner(model, mode, backend) as runner:
        graphs = DecodeGraphs(runner, max_sequences=8, max_seq_len=96)
        found, held_too = run_steps(runner, graphs.forward, "cuda")
        assert graphs.num_graphs == 3
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 0.02 * other.abs().max()
        assert one.isfinite().all()
    for one, other in zip(held_too, held, strict=True):
        # what lies in a page may differ by rounding, but not where something lies
        assert torch.equal(one == 0x7F, other == 0x7F) or mode == "bf16"
        untouched = [page for row in PAGE_LISTS[5:] for page in row]
        assert (one[untouched] == 0x7F).all()


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_runs_on_without_graphs(tiny_checkpoint, caplog):
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    model = load_model(checkpoint, dtype=torch.bfloat16, device="cuda")
    backend = choose_backend(None, "cuda")
    with make_runner(model, "bf16", backend) as runner:
        expected, _ = run_steps(runner, runner.forward, "cuda")

        class Waiting:
            cache = runner.cache

            def forward(self, batch):
                batch.seq_lens.sum().item()
                return runner.forward(batch)

        graphs = DecodeGraphs(Waiting(), max_sequences=8, max_seq_len=96)
        with caplog.at_level(logging.WARNING):
            found, _ = run_steps(runner, graphs.forward, "cuda")
    assert len(caplog.records) == 1
    assert graphs.num_graphs == 0
    assert torch.cuda.get_sync_debug_mode() == 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
