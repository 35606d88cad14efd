"""The whole road: a checkpoint in, a checkpoint with scales out, on every base."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import fp8kv.calibrate
from fp8kv.calibrate import ScaleSet, calibrate, derive_scales, load_statistics, pipeline, validate
from fp8kv.calibrate import measure as measure_module
from fp8kv.calibrate.capture import Capture
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.kv_names import find_kv_scales
from fp8kv.calibrate.pipeline import write_from_statistics
from fp8kv.calibrate.statistics import absmax_by_layer
from fp8kv.demo import BUILTIN_DATASETS, MODELS, TRAIN_DATA
from fp8kv.recipes import default_recipe, load_recipe, override
from fp8kv.recipes.errors import OutputError, RecipeError, StatisticsError

BASES = ["bf16-llama", "fp8-minimax", "fp8-deepseek", "int4-llama"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_models, quantised_models, tiny_checkpoint):
    """One checkpoint of each base."""
    directory = tmp_path_factory.mktemp("sources")
    tiny_models.save_tiny_model("llama", directory / "bf16", dtype=torch.bfloat16)
    quantised_models.save_int4(tiny_checkpoint("llama"), directory / "int4")
    return {
        "bf16-llama": directory / "bf16",
        "fp8-minimax": MODELS["tiny-minimax-m2"],
        "fp8-deepseek": MODELS["tiny-deepseek-v3"],
        "int4-llama": directory / "int4",
    }


def recipe(**changes):
    data = {"data.sources": [{"dataset": str(TRAIN_DATA)}]}
    return override(
        default_recipe(), {**data, "data.num_samples": 16, "data.seq_len": 48, **changes}
    )


@pytest.fixture(scope="module")
def calibrated(sources, tmp_path_factory):
    """Calibrate a base once; the result and its directory are shared."""
    results = {}

    def get(base):
        if base not in results:
            out = tmp_path_factory.mktemp("calibrated") / base
            results[base] = calibrate(str(sources[base]), out, recipe=recipe(), device="cpu")
        return results[base]

    return get


def findings(directory):
    """Return the failed checks, the plausibility against the statistics included."""
    checks = validate(directory, lambda path: absmax_by_layer(load_statistics(path)))
    assert "plausible" in {check.name for check in checks}
    return [check for check in checks if not check.passed]


def contents(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def written_scales(directory):
    found = {}
    for scale in find_kv_scales(open_checkpoint(directory)):
        for stream in scale.stream:
            found.setdefault(scale.layer, {}).setdefault(stream, set()).add(scale.value.item())
    return found


@pytest.mark.parametrize("base", BASES)
def test_the_result_validates_clean(calibrated, base):
    assert findings(calibrated(base).out) == []


@pytest.mark.parametrize("base", BASES)
def test_the_scales_are_those_of_the_statistics_and_stand_in_the_files(calibrated, base):
    result = calibrated(base)
    expected = {}
    for layer, (k, v) in absmax_by_layer(result.stats).items():
        # the largest value at most 448, by the next power of two
        k, v = (2.0 ** math.ceil(math.log2(absmax / 448)) for absmax in (k, v))
        expected[layer] = {"k": {k}, "v": {v}}
    assert written_scales(result.out) == expected
    assert {layer.name: (layer.k, layer.v) for layer in result.scales.layers} == {
        layer: (tuple(streams["k"]), tuple(streams["v"])) for layer, streams in expected.items()
    }


def test_mla_gets_one_scale_for_the_whole_row(calibrated):
    result = calibrated("fp8-deepseek")
    scales = written_scales(result.out)
    assert len(scales) == 5
    for layer in result.stats.layers:
        assert scales[layer.name]["k"] == scales[layer.name]["v"]
        rope = layer.streams["ROPE"].channel_absmax.max()
        assert rope > layer.streams["LATENT"].channel_absmax.max()
        assert rope / min(scales[layer.name]["k"]) <= 448
    assert {effect.loads for effect in result.effects} == {"ignored"}


@pytest.mark.parametrize("base", BASES)
def test_the_output_holds_the_files_that_are_documented(calibrated, sources, base):
    out, source = calibrated(base).out, sources[base]
    side = {path for path in contents(out) if path.startswith("fp8kv/")}
    assert side == {
        "fp8kv/manifest.json",
        "fp8kv/kv-stats.safetensors",
        "fp8kv/recipe.yaml",
        "fp8kv/calibration.json",
        "fp8kv/original/config.json",
        *(
            ["fp8kv/original/model.safetensors.index.json"]
            if (source / "model.safetensors.index.json").exists()
            else []
        ),
    }
    assert set(contents(out)) > {"config.json", "model-kv-scales.safetensors", "tokenizer.json"}
    assert (out / "fp8kv/original/config.json").read_bytes() == (
        source / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("base", BASES)
def test_the_source_stays_as_it_was_and_its_weights_are_not_copied(sources, tmp_path, base):
    before = contents(sources[base])
    calibrate(str(sources[base]), tmp_path / "out", recipe=recipe(), link="symlink", device="cpu")
    assert contents(sources[base]) == before
    links = {path.resolve() for path in (tmp_path / "out").iterdir() if path.is_symlink()}
    assert links >= {path.resolve() for path in sources[base].glob("*.safetensors")}


@pytest.mark.parametrize("base", ["bf16-llama", "fp8-deepseek"])
def test_the_result_is_told_in_json_and_by_the_result(calibrated, base):
    result = calibrated(base)
    told = json.loads((result.out / "fp8kv/calibration.json").read_text())
    assert ScaleSet.from_json(told["scales"]) == result.scales
    assert told["verdicts"] == [verdict.to_json() for verdict in result.verdicts]
    assert len(result.verdicts) == 2 * len(result.scales.layers)
    assert told["convergence"][-1]["largest_change"] == 0
    assert [point.tokens for point in result.curve] == [
        point["tokens"] for point in told["convergence"]
    ]
    assert len(result.samples.samples) == 16
    assert result.seconds > 0


def test_the_statistics_in_the_output_are_those_of_the_result(calibrated):
    result = calibrated("bf16-llama")
    stats = load_statistics(result.out / "fp8kv/kv-stats.safetensors")
    assert derive_scales(stats, recipe().scales) == result.scales
    assert stats.provenance == result.stats.provenance
    assert torch.equal(stats.tokens, result.stats.tokens)


def test_the_resolved_recipe_can_be_used_again(calibrated, sources, tmp_path):
    result = calibrated("bf16-llama")
    again = load_recipe(str(result.out / "fp8kv/recipe.yaml"))
    assert again == recipe()
    second = calibrate(str(sources["bf16-llama"]), tmp_path / "out", recipe=again, device="cpu")
    assert second.scales == result.scales
    assert contents(tmp_path / "out") == contents(result.out)


def test_a_builtin_dataset_is_found_by_its_name(sources, tmp_path):
    named = recipe(**{"data.sources": [{"dataset": "builtin:gsm-synth"}]})
    result = calibrate(
        str(sources["bf16-llama"]),
        tmp_path / "out",
        recipe=named,
        device="cpu",
        builtin_datasets=BUILTIN_DATASETS,
    )
    # the file keeps the name, which means the same on every machine
    assert load_recipe(str(tmp_path / "out/fp8kv/recipe.yaml")) == named
    assert len(result.samples.samples) == 16


def test_per_head_scales_are_written_and_validate(sources, tmp_path):
    head = recipe(**{"scales.granularity": "head", "output.targets": ["vllm"]})
    result = calibrate(str(sources["bf16-llama"]), tmp_path / "out", recipe=head, device="cpu")
    tensors = load_file(tmp_path / "out/model-kv-scales.safetensors")
    assert {tensor.numel() for tensor in tensors.values()} == {2}
    assert {len(layer.k) for layer in result.scales.layers} == {2}
    assert findings(tmp_path / "out") == []


# --- statistics only, and scales from statistics ---


def test_statistics_alone_write_no_checkpoint(sources, tmp_path, calibrated):
    result = calibrate(
        str(sources["bf16-llama"]),
        tmp_path / "out",
        recipe=recipe(),
        stats_only=True,
        device="cpu",
    )
    assert set(contents(tmp_path / "out")) == {
        "kv-stats.safetensors",
        "recipe.yaml",
        "calibration.json",
    }
    assert result.effects == ()
    assert result.scales == calibrated("bf16-llama").scales
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scales_are_derived_again_without_the_model(calibrated, sources, tmp_path, monkeypatch):
    stats = load_statistics(calibrated("bf16-llama").out / "fp8kv/kv-stats.safetensors")
    other = recipe(**{"scales.power_of_two": False, "scales.headroom": 2.0})
    monkeypatch.setattr(pipeline, "load_model", None)
    effects = write_from_statistics(
        stats,
        other.scales,
        model=str(sources["bf16-llama"]),
        out=tmp_path / "out",
        targets=("vllm",),
        recipe=other,
    )
    assert [(effect.target, effect.loads) for effect in effects] == [("vllm", "loads")]
    expected = derive_scales(stats, other.scales)
    assert expected != calibrated("bf16-llama").scales
    assert written_scales(tmp_path / "out") == {
        layer.name: {"k": set(layer.k), "v": set(layer.v)} for layer in expected.layers
    }
    assert findings(tmp_path / "out") == []
    assert load_recipe(str(tmp_path / "out/fp8kv/recipe.yaml")) == other


def test_statistics_of_another_checkpoint_are_refused(calibrated, sources, tmp_path):
    stats = calibrated("bf16-llama").stats
    with pytest.raises(StatisticsError) as error:
        write_from_statistics(
            stats,
            recipe().scales,
            model=str(sources["int4-llama"]),
            out=tmp_path / "out",
            targets=("vllm",),
            recipe=recipe(),
        )
    message = str(error.value)
    assert f"measured on {sources['bf16-llama']}" in message
    assert f"{sources['int4-llama']} is not that checkpoint" in message
    assert not (tmp_path / "out").exists()


# --- interruption and refusal ---


@pytest.mark.parametrize("base", ["bf16-llama", "fp8-deepseek"])
def test_an_interrupted_calibration_leaves_no_output_and_goes_on(
    calibrated, sources, tmp_path, monkeypatch, base
):
    run = Capture.run
    batches = []

    def stop_at_third(self, batch):
        batches.append(batch)
        if len(batches) == 3:
            raise KeyboardInterrupt
        run(self, batch)

    arguments = {"recipe": recipe(), "device": "cpu"}
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(measure_module, "SNAPSHOT_SECONDS", -1.0)
        patch.setattr(Capture, "run", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            calibrate(str(sources[base]), out, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == [".out.fp8kv-progress.safetensors"]

    progress = []
    listener = RecordingListener(progress)
    result = calibrate(str(sources[base]), out, listener=listener, **arguments)
    assert next(done for stage, done, _ in progress if stage == "measure") > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(out) == contents(calibrated(base).out)
    assert result.scales == calibrated(base).scales


class RecordingListener:
    def __init__(self, calls):
        self.calls = calls
        self.stages = []

    def stage(self, name):
        self.stages.append(name)

    def advance(self, done, total):
        self.calls.append((self.stages[-1], done, total))


def test_a_listener_is_told_of_every_stage_and_its_progress(sources, tmp_path):
    listener = RecordingListener([])
    result = calibrate(
        str(sources["bf16-llama"]),
        tmp_path / "out",
        recipe=recipe(),
        device="cpu",
        listener=listener,
    )
    assert listener.stages == ["data", "load", "measure", "write"]
    ends = {stage: (done, total) for stage, done, total in listener.calls}
    tokens = int(result.stats.tokens.sum())
    read, size = ends.pop("load")
    assert read == size > 0
    assert ends == {"data": (16, 16), "measure": (tokens, tokens)}


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*_arguments, **_options):
        pytest.fail("work was begun")

    for name in ("load_tokenizer", "load_samples", "load_model", "measure"):
        monkeypatch.setattr(pipeline, name, refuse)


def test_an_output_that_exists_is_refused_before_any_work(sources, tmp_path, no_work):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"out exists, and fp8kv never overwrites"):
        calibrate(str(sources["bf16-llama"]), tmp_path / "out", recipe=recipe(), device="cpu")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("below", "words"), [("", "is the source itself"), ("x", "lies inside")])
def test_an_output_in_the_source_is_refused_before_any_work(sources, no_work, below, words):
    source = sources["bf16-llama"]
    before = contents(source)
    with pytest.raises(OutputError, match=words):
        calibrate(str(source), source / below, recipe=recipe(), device="cpu")
    assert contents(source) == before


def test_statistics_alone_do_not_overwrite_either(sources, tmp_path, no_work):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        calibrate(
            str(sources["bf16-llama"]),
            tmp_path / "out",
            recipe=recipe(),
            stats_only=True,
            device="cpu",
        )
    assert (tmp_path / "out").read_text() == "mine"


def test_a_recipe_for_another_model_is_refused_before_any_work(sources, tmp_path, no_work):
    with pytest.raises(RecipeError, match="recipe minimax-m2 does not fit this checkpoint"):
        calibrate(
            str(sources["bf16-llama"]),
            tmp_path / "out",
            recipe=load_recipe("minimax-m2"),
            device="cpu",
        )
    assert list(tmp_path.iterdir()) == []


def test_scales_from_statistics_do_not_overwrite_either(calibrated, sources, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(pipeline, "derive_scales", None)
    with pytest.raises(OutputError, match="exists"):
        write_from_statistics(
            calibrated("bf16-llama").stats,
            recipe().scales,
            model=str(sources["bf16-llama"]),
            out=tmp_path / "out",
            targets=("vllm",),
            recipe=recipe(),
        )


def test_statistics_that_cannot_be_written_leave_nothing_half_done(sources, tmp_path, monkeypatch):
    write = pipeline.Path.write_bytes
    arguments = {"recipe": recipe(), "stats_only": True, "device": "cpu"}

    def fail_at_recipe(path, data):
        if path.name == "recipe.yaml":
            raise OSError(28, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Path, "write_bytes", fail_at_recipe)
        with pytest.raises(OutputError, match=r"cannot write .*out: No space left on device"):
            calibrate(str(sources["bf16-llama"]), tmp_path / "out", **arguments)
    # the measurement is kept, so that the next run need not repeat it
    assert [path.name for path in tmp_path.iterdir()] == [".out.fp8kv-progress.safetensors"]
    calibrate(str(sources["bf16-llama"]), tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- the package's public names ---


def test_every_public_name_is_there_and_documented():
    for name in fp8kv.calibrate.__all__:
        assert getattr(fp8kv.calibrate, name).__doc__
    with pytest.raises(AttributeError, match=r"'fp8kv\.calibrate' has no attribute 'nothing'"):
        _ = fp8kv.calibrate.nothing


def test_importing_the_package_imports_no_torch():
    code = "import sys, fp8kv.calibrate; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
