"""A measurement that is interrupted anywhere goes on to the same statistics, bit for bit."""

import pytest
import torch

from fp8kv.calibrate import measure as measure_module
from fp8kv.calibrate.capture import Capture
from fp8kv.calibrate.data.loading import Source, load_samples
from fp8kv.calibrate.folds import NUM_FOLDS
from fp8kv.calibrate.measure import measure
from fp8kv.calibrate.modeling.load import load_model, load_tokenizer
from fp8kv.calibrate.plan import plan_calibration
from fp8kv.calibrate.stats_file import encode_statistics, load_statistics
from fp8kv.demo import TRAIN_DATA
from fp8kv.recipes import default_recipe, override, recipe_digest
from fp8kv.recipes.errors import CalibrationError

PAD = 258


class Run:
    """One calibration up to its statistics."""

    def __init__(self, path, **changes):
        changes = {
            "data.num_samples": 20,
            "data.seq_len": 24,
            "calibration.batch_size": 3,
        } | changes
        source = {"dataset": str(TRAIN_DATA)}
        recipe = override(default_recipe(), {"data.sources": [source], **changes})
        self.plan = plan_calibration(str(path), recipe, device="cpu")
        self.samples = load_samples(
            [Source(str(TRAIN_DATA))],
            load_tokenizer(self.plan.checkpoint),
            num_samples=recipe.data.num_samples,
            seq_len=recipe.data.seq_len,
            seed=recipe.data.seed,
        )
        self.model = load_model(self.plan.checkpoint, dtype=self.plan.dtype, device="cpu")

    def measure(self, **options):
        return measure(self.plan, self.model, self.samples, pad_token_id=PAD, **options)


@pytest.fixture(params=["llama", "deepseek_v3"])
def run(request, tiny_checkpoint):
    return Run(tiny_checkpoint(request.param))


@pytest.fixture
def llama(tiny_checkpoint):
    return Run(tiny_checkpoint("llama"))


@pytest.fixture
def every_batch(monkeypatch):
    """Save after every batch."""
    monkeypatch.setattr(measure_module, "SNAPSHOT_SECONDS", -1.0)


@pytest.fixture
def interrupt(monkeypatch):
    """Let so many batches through, then behave as if the user stopped the program; return the shapes of all."""
    run = Capture.run
    state = {"left": 0, "shapes": []}

    def limited(self, batch):
        if state["left"] == 0:
            raise KeyboardInterrupt
        state["left"] -= 1
        state["shapes"].append(list(batch.token_ids.shape))
        run(self, batch)

    monkeypatch.setattr(Capture, "run", limited)

    def after(batches):
        state["left"] = batches
        state["shapes"].clear()
        return state["shapes"]

    return after


def count_batches(run):
    return len(measure_module._make_batches(run.plan, run.samples, PAD))


def test_the_statistics_say_what_was_measured(run):
    stats = run.measure()
    provenance = stats.provenance
    assert provenance.model == str(run.plan.checkpoint.path)
    assert provenance.model_digest == run.plan.checkpoint.digest()
    assert provenance.architecture == run.plan.facts.architecture
    assert provenance.attention == run.plan.facts.attention
    assert provenance.dtype == "float32"
    assert provenance.recipe_digests == (recipe_digest(run.plan.recipe),)
    assert provenance.data_digests == (run.samples.digest,)
    assert [layer.name for layer in stats.layers] == [x.name for x in run.plan.facts.layers]
    assert [layer.index for layer in stats.layers] == [x.index for x in run.plan.facts.layers]


def test_tokens_and_samples_are_counted_by_fold(run):
    stats = run.measure()
    for fold in range(NUM_FOLDS):
        mine = [sample for sample in run.samples.samples if sample.fold == fold]
        assert stats.samples[fold] == len(mine)
        assert stats.tokens[fold] == sum(sample.num_tokens for sample in mine)
        for layer in stats.layers:
            for stream in layer.streams.values():
                counted = stream.histogram[fold].sum(-1) + stream.zeros[fold]
                assert (counted == stats.tokens[fold] * stream.width).all()
    assert stats.samples.sum() == 20


def test_progress_goes_from_nothing_to_all_tokens(llama):
    calls = []
    stats = llama.measure(progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0] == 0
    assert calls[-1][0] == int(stats.tokens.sum())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {int(stats.tokens.sum())}
    assert len(calls) == 1 + count_batches(llama)


@pytest.mark.parametrize("stop_after", [1, 4, -1])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    run, tmp_path, every_batch, interrupt, stop_after
):
    total = count_batches(run)
    stop_after %= total
    interrupt(total)
    whole = encode_statistics(run.measure())
    snapshot = tmp_path / "snapshot.safetensors"

    interrupt(stop_after)
    with pytest.raises(KeyboardInterrupt):
        run.measure(snapshot=snapshot)
    assert int(load_statistics(snapshot).samples.sum()) < 20

    calls = []
    shapes = interrupt(total)
    resumed = run.measure(snapshot=snapshot, progress=lambda done, _: calls.append(done))
    assert len(shapes) == total - stop_after
    assert calls[0] > 0
    assert encode_statistics(resumed) == whole
    assert encode_statistics(load_statistics(snapshot)) == whole


def test_a_run_interrupted_at_every_batch_comes_to_its_end(run, tmp_path, every_batch, interrupt):
    total = count_batches(run)
    interrupt(total)
    whole = encode_statistics(run.measure())
    snapshot = tmp_path / "snapshot.safetensors"
    for _ in range(total - 1):
        interrupt(1)
        with pytest.raises(KeyboardInterrupt):
            run.measure(snapshot=snapshot)
    interrupt(1)
    assert encode_statistics(run.measure(snapshot=snapshot)) == whole


def test_a_finished_run_is_not_repeated(llama, tmp_path, interrupt):
    snapshot = tmp_path / "snapshot.safetensors"
    interrupt(100)
    whole = encode_statistics(llama.measure(snapshot=snapshot))
    shapes = interrupt(0)
    assert encode_statistics(llama.measure(snapshot=snapshot)) == whole
    assert shapes == []


def test_what_is_lost_is_bounded_by_time(llama, tmp_path, monkeypatch, interrupt):
    clock = {"now": 0.0}
    monkeypatch.setattr(measure_module.time, "monotonic", lambda: clock["now"])
    snapshot = tmp_path / "snapshot.safetensors"
    saved_after = []
    save = measure_module.save_statistics

    def note(stats, path, extra):
        saved_after.append(extra["batches"])
        save(stats, path, extra)

    def tell(_done, _total):
        clock["now"] += 11

    monkeypatch.setattr(measure_module, "save_statistics", note)
    interrupt(100)
    llama.measure(snapshot=snapshot, progress=tell)
    # a batch takes 11 seconds, and 30 may be lost
    total = count_batches(llama)
    assert saved_after == [*range(3, total + 1, 3), total]
    assert total % 3 != 0


@pytest.mark.parametrize(
    "other",
    [
        {"data.num_samples": 21},
        {"data.seed": 5},
        {"calibration.batch_size": 2},
        {"calibration.dtype": "bfloat16"},
        {"scales.headroom": 2.0},
    ],
)
def test_a_snapshot_of_another_run_is_ignored(
    llama, tiny_checkpoint, tmp_path, every_batch, interrupt, other
):
    snapshot = tmp_path / "snapshot.safetensors"
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        Run(tiny_checkpoint("llama"), **other).measure(snapshot=snapshot)
    shapes = interrupt(100)
    found = encode_statistics(llama.measure(snapshot=snapshot))
    assert len(shapes) == count_batches(llama)
    interrupt(100)
    assert found == encode_statistics(llama.measure())


def test_a_snapshot_of_other_data_is_ignored(tiny_checkpoint, tmp_path, every_batch, interrupt):
    # a file that changed under the same name: same recipe, same shapes
    changes = {"data.num_samples": 4, "calibration.batch_size": 1}
    mine, other = (Run(tiny_checkpoint("llama"), **changes) for _ in range(2))
    other.samples = Run(tiny_checkpoint("llama"), **changes, **{"data.seed": 5}).samples
    snapshot = tmp_path / "snapshot.safetensors"
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        other.measure(snapshot=snapshot)
    shapes = interrupt(100)
    stats = mine.measure(snapshot=snapshot)
    assert shapes == [[1, 24]] * 4
    assert stats.provenance.data_digests == (mine.samples.digest,)


def test_a_snapshot_of_another_model_is_ignored(
    llama, tiny_checkpoint, tmp_path, every_batch, interrupt
):
    snapshot = tmp_path / "snapshot.safetensors"
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        Run(tiny_checkpoint("mistral")).measure(snapshot=snapshot)
    interrupt(100)
    stats = llama.measure(snapshot=snapshot)
    assert stats.provenance.architecture == "LlamaForCausalLM"
    assert int(stats.samples.sum()) == 20


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08" + b"\x00" * 7 + b'{"a": 1}'])
def test_a_damaged_snapshot_is_ignored(llama, tmp_path, content):
    snapshot = tmp_path / "snapshot.safetensors"
    snapshot.write_bytes(content)
    assert int(llama.measure(snapshot=snapshot).samples.sum()) == 20
    assert int(load_statistics(snapshot).samples.sum()) == 20


def test_a_layer_that_records_nothing_stops_the_run_at_its_first_batch(llama, monkeypatch):
    attention = llama.model.model.layers[1].self_attn
    forward = attention.forward

    def skip_update(hidden_states, past_key_values=None, **options):
        return forward(hidden_states, past_key_values=None, **options)

    monkeypatch.setattr(attention, "forward", skip_update)
    calls = []
    with pytest.raises(CalibrationError, match=r"recorded nothing, first model\.layers\.1"):
        llama.measure(progress=lambda done, _total: calls.append(done))
    assert len(calls) == 2


def test_nan_stops_the_run_at_its_first_batch(llama, tmp_path):
    llama.model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = float("nan")
    calls = []
    with pytest.raises(CalibrationError, match=r"^V of model\.layers\.0\.self_attn holds"):
        llama.measure(snapshot=tmp_path / "s", progress=lambda done, _total: calls.append(done))
    assert len(calls) == 2
    assert not (tmp_path / "s").exists()


def test_too_little_memory_names_the_batch_and_the_remedy(llama, monkeypatch):
    def fail(_self, _batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Capture, "run", fail)
    with pytest.raises(CalibrationError) as error:
        llama.measure()
    assert str(error.value) == (
        "cpu ran out of memory with [3, 24] tokens in a batch: lower --batch-size or --seq-len"
    )
    assert error.value.__cause__ is None


@pytest.mark.parametrize(("limit", "largest"), [(100, 4), (10, 1)])
def test_without_a_batch_size_batches_are_bounded_in_tokens(
    tiny_checkpoint, monkeypatch, interrupt, limit, largest
):
    run = Run(tiny_checkpoint("llama"), **{"calibration.batch_size": None})
    monkeypatch.setattr(measure_module, "_CPU_BATCH_TOKENS", limit)
    shapes = interrupt(100)
    stats = run.measure()
    # samples of 24 tokens; one that is longer than the limit makes a batch of its own
    assert max(rows for rows, _ in shapes) == largest
    assert sum(rows for rows, _ in shapes) == int(stats.samples.sum()) == 20
