"""What a user can do wrong: each gets one sentence, and loses nothing.

Every case runs the command line and asks the same of it: status 3, one sentence on stderr that names the culprit and
the remedy, nothing on stdout, no file made or changed.
"""

import errno
import hashlib
import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from fp8kv.calibrate.overlay import writer
from fp8kv.demo import MODELS, TRAIN_DATA
from fp8kv.main import cli

LAYERS = 3


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A small Llama checkpoint in several shards, with a real tokenizer."""
    path = tmp_path_factory.mktemp("template") / "llama"
    donor = MODELS["tiny-minimax-m2"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=json.loads((donor / "config.json").read_text())["vocab_size"],
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(donor / name, path / name)
    return path


@pytest.fixture
def source(template, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(template, tmp_path / "source")


@pytest.fixture
def data(tmp_path):
    """Twenty short texts."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(TRAIN_DATA.read_text().splitlines(keepends=True)[:20]))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def calibrate(source, data, out):
    """Run ``fp8kv calibrate`` on the checkpoint; options that are given again win."""

    def run(*options, model=source, to=out, dataset=data):
        options = ("--num-samples", "4", "--seq-len", "16", "--dataset", dataset, *options)
        return invoke("calibrate", model, "--out", to, "--quiet", *options)

    return run


@pytest.fixture
def fails(tmp_path):
    """Assert that a command fails as it should, and return its sentence."""

    def check(command, *options, names=(), remedy="", left=(), **keywords):
        before = snapshot(tmp_path)
        result = command(*options, **keywords)
        assert result.exit_code == 3, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert "Traceback" not in line
        for name in names:
            assert str(name) in line
        assert remedy
        assert remedy in line
        after = snapshot(tmp_path)
        assert {path: after.get(path) for path in before} == before, "nothing is lost"
        new = {path for path in after if path not in before}
        assert new == {str(tmp_path / name) for name in left}, "nothing is left behind"
        return line

    return check


def invoke(*arguments):
    runner = CliRunner()
    return runner.invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


def snapshot(root):
    """Return every path under ``root`` with its content's hash (None for a directory)."""
    return {
        str(path): None if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
    }


def shard_of(source, tensor):
    index = json.loads((source / "model.safetensors.index.json").read_text())
    return source / index["weight_map"][tensor]


def edit_index(source, edit):
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_config(source, **changes):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def poison(source, name, value):
    path = shard_of(source, name)
    tensors = safetensors.torch.load_file(path)
    tensors[name][0, 0] = value
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def no_space(*_arguments, **_keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_checkpoint_is_sound_before_it_is_damaged(calibrate, out):
    result = calibrate()

    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{out}\n", "")


# checkpoints


@pytest.mark.parametrize("command", ["calibrate", "inspect"])
def test_truncated_shard(fails, calibrate, source, command):
    shard = shard_of(source, "model.embed_tokens.weight")
    os.truncate(shard, shard.stat().st_size - 100)
    runs = {"calibrate": calibrate, "inspect": lambda: invoke("inspect", source)}

    line = fails(runs[command], names=[shard], remedy="download it again")

    assert "truncated: 100 of" in line


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:4],
        lambda raw: raw[:8] + b"}" + raw[9:],
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw + b"more",
    ],
    ids=["empty", "cut in the length", "no JSON", "huge length", "too long"],
)
def test_corrupt_shard(fails, calibrate, source, damage):
    shard = shard_of(source, "model.norm.weight")
    shard.write_bytes(damage(shard.read_bytes()))

    fails(calibrate, names=[shard], remedy="download")


def test_shard_with_a_dtype_that_nobody_knows(fails, calibrate, source):
    shard = shard_of(source, "model.norm.weight")
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"F33"', 1))

    fails(calibrate, names=[shard, "F33"], remedy="known are F4")


def test_shard_that_the_index_names_is_missing(fails, calibrate, source):
    shard = shard_of(source, "lm_head.weight")
    shard.unlink()

    fails(calibrate, names=[shard.name], remedy="which is missing; download it again")


def test_tensor_that_the_index_names_is_missing(fails, calibrate, source):
    shard = shard_of(source, "lm_head.weight").name
    edit_index(source, lambda weight_map: weight_map.update({"model.ghost": shard}))

    fails(calibrate, names=["model.ghost", shard], remedy="download both again")


@pytest.mark.parametrize(
    "entry",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..\\x.safetensors"],
)
def test_index_entry_that_leaves_the_directory(fails, calibrate, source, entry):
    secret = source.parent / "secret.safetensors"
    shutil.copy(shard_of(source, "lm_head.weight"), secret)
    edit_index(source, lambda weight_map: weight_map.update({"lm_head.weight": entry}))

    line = fails(calibrate, names=["lm_head.weight"], remedy="must be a plain file name")

    assert "leaves the checkpoint's directory" in line


def test_pickle_only_checkpoint(fails, calibrate, source):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")

    fails(calibrate, names=[source, "pytorch_model.bin"], remedy="convert them to safetensors")


def test_directory_that_is_no_checkpoint(fails, calibrate, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()

    fails(calibrate, model=empty, names=[empty, "config.json"], remedy="name the directory")


def test_directory_that_does_not_exist(fails, calibrate, tmp_path):
    absent = tmp_path / "absent" / "deeper"

    fails(calibrate, model=absent, names=[absent], remedy="name a checkpoint directory")


def test_architecture_that_transformers_does_not_know(fails, calibrate, source):
    edit_config(source, architectures=["MegaFormerForCausalLM"], model_type="megaformer")

    names = [source / "config.json", "megaformer"]
    fails(calibrate, names=names, remedy="--trust-remote-code")


def test_architecture_without_attention_that_fp8kv_knows(fails, calibrate, source):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    names = {"blocks.0.mixer.weight": torch.ones(2, 2)}
    safetensors.torch.save_file(names, source / "model.safetensors")
    edit_config(source, architectures=["MegaFormerForCausalLM"], model_type="megaformer")

    fails(calibrate, names=["MegaFormerForCausalLM"], remedy="fp8kv")


def test_quantisation_that_no_engine_gives_scales(fails, calibrate, source):
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})

    fails(calibrate, names=[source, "gptq"], remedy="start from the BF16")


# recipes


def test_unknown_recipe_key(fails, calibrate, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schema: 1\nname: mine\nscales: {estimater: mse}\n")

    fails(
        calibrate,
        *("--recipe", recipe),
        names=[recipe, "scales.estimater"],
        remedy="did you mean estimator?",
    )


def test_recipe_for_another_model(fails, calibrate):
    fails(
        calibrate,
        *("--recipe", "minimax-m2"),
        names=["minimax-m2", "model_type is llama, expected minimax_m2"],
        remedy="choose another recipe",
    )


# data


def test_wrong_column(fails, calibrate, data):
    fails(calibrate, dataset=f"{data},column=txet", names=[data, "txet"], remedy="'question'")


def test_no_column_that_is_known(fails, calibrate, tmp_path):
    data = tmp_path / "odd.jsonl"
    data.write_text('{"body": "some words"}\n')

    fails(calibrate, dataset=data, names=[data, "body"], remedy="column=")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.csv", "empty.txt"])
def test_empty_dataset(fails, calibrate, tmp_path, name):
    data = tmp_path / name
    data.write_text("[]" if name.endswith(".json") else "")

    line = fails(calibrate, dataset=data, names=[data], remedy="name another")

    assert "empty" in line


def test_fewer_samples_than_asked(fails, calibrate, data):
    fails(
        calibrate,
        *("--num-samples", "21"),
        names=[data, "20 samples where 21 are asked"],
        remedy="lower --num-samples to 20",
    )


def test_dataset_that_does_not_exist(fails, calibrate, tmp_path):
    fails(calibrate, dataset=tmp_path / "no.jsonl", names=[tmp_path / "no.jsonl"], remedy="exist")


# measuring


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("projection", "stream"), [("k_proj", "K"), ("v_proj", "V")])
def test_values_that_are_not_finite_in_a_named_layer(
    fails, calibrate, source, value, projection, stream
):
    poison(source, f"model.layers.1.self_attn.{projection}.weight", value)

    fails(
        calibrate,
        names=[f"{stream} of model.layers.1.self_attn holds"],
        remedy="try --dtype float32 or bfloat16",
    )


def test_device_that_does_not_exist(fails, calibrate):
    fails(calibrate, *("--device", "cuda:99"), names=["cuda:99"], remedy="cannot be used here")


# output


def test_output_exists(fails, calibrate, out):
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    fails(calibrate, names=[out], remedy="name a new directory or remove it")


def test_source_equals_output(fails, calibrate, source, tmp_path):
    fails(calibrate, to=source, names=[source], remedy="name a new directory")
    link = tmp_path / "link"
    link.symlink_to(source)
    line = fails(calibrate, to=link, names=[link], remedy="name a new directory")
    assert "is the source itself" in line


def test_output_inside_the_source(fails, calibrate, source):
    inside = source / "out"

    fails(calibrate, to=inside, names=[inside, source], remedy="name a directory outside")


@pytest.mark.parametrize("option", [(), ("--stats-only",)])
def test_no_space_left_from_the_start(fails, calibrate, monkeypatch, option):
    monkeypatch.setattr(os, "fsync", no_space)

    fails(calibrate, *option, names=["cannot write"], remedy="No space left on device")


def test_no_space_left_at_the_end_keeps_what_was_measured(
    fails, calibrate, out, monkeypatch, tmp_path
):
    with monkeypatch.context() as full:
        full.setattr(writer, "_sync", no_space)
        left = [".out.fp8kv-progress.safetensors"]
        line = fails(calibrate, names=[out], remedy="No space left on device", left=left)
        assert "the partial output was removed, the source is untouched" in line

    result = calibrate()

    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert not (tmp_path / left[0]).exists()


def test_no_space_left_for_statistics_alone(fails, calibrate, out, monkeypatch):
    def write(path, content):
        if path.name == "recipe.yaml":
            no_space()
        return written(path, content)

    written = type(out).write_bytes
    monkeypatch.setattr(type(out), "write_bytes", write)
    left = [".out.fp8kv-progress.safetensors"]

    fails(calibrate, "--stats-only", names=[out], remedy="No space left on device", left=left)


def test_scale_tensors_already_present_from_fp8kv(fails, calibrate, out, tmp_path):
    assert calibrate().exit_code == 0

    fails(
        calibrate,
        model=out,
        to=tmp_path / "again",
        names=[out, f"{2 * LAYERS} KV scale tensors"],
        remedy="run `fp8kv strip` on it, or start from its source",
    )


@pytest.mark.parametrize("name", ["k_scale", "k_proj.k_scale", "attn.v_scale", "kv_scale"])
def test_scale_tensors_already_present_from_others(fails, calibrate, source, name):
    tensor = f"model.layers.0.self_attn.{name}"
    safetensors.torch.save_file({tensor: torch.ones(1)}, source / "scales.safetensors")
    edit_index(source, lambda weight_map: weight_map.update({tensor: "scales.safetensors"}))

    fails(calibrate, names=[source, tensor], remedy="start from a checkpoint without")
