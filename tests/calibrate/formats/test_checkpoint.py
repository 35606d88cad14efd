"""Opening checkpoints: what is read, and every kind of broken, unsafe or missing file."""

import json
import struct

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from fp8kv.calibrate.formats import checkpoint as checkpoint_module
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.recipes.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
A = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3)}
B = {"b": torch.ones(2, dtype=torch.bfloat16), "c": torch.zeros(1, dtype=torch.int32)}


def write(path, shards, index=None, config=CONFIG):
    """Write a checkpoint; the index, unless given, is what the shards hold."""
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for shard, tensors in shards.items():
        save_file(tensors, path / shard)
    if index is None:
        index = {name: shard for shard, tensors in shards.items() for name in tensors}
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index}, indent=2)
        (path / "model.safetensors.index.json").write_text(text)
    return path


def refused(path, revision=None):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, revision)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def sharded(tmp_path):
    return write(tmp_path / "model", {"x.safetensors": A, "y.safetensors": B})


def test_opens_a_sharded_checkpoint(sharded):
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.path == sharded
    assert checkpoint.source == str(sharded)
    assert checkpoint.revision is None
    assert checkpoint.config == CONFIG
    assert checkpoint.config_text == (sharded / "config.json").read_text()
    assert checkpoint.index_text == (sharded / "model.safetensors.index.json").read_text()
    assert checkpoint.weight_map == {
        "a": "x.safetensors",
        "b": "y.safetensors",
        "c": "y.safetensors",
    }
    assert list(checkpoint.shards) == ["x.safetensors", "y.safetensors"]
    assert checkpoint.entry("a").shape == (2, 3)
    assert checkpoint.entry("b").dtype == "BF16"


def test_opens_a_single_file(tmp_path):
    path = write(tmp_path / "model", {"model.safetensors": {**A, **B}}, index={})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.index_text is None
    assert checkpoint.weight_map == dict.fromkeys("abc", "model.safetensors")
    assert torch.equal(checkpoint.read("a"), A["a"])


def test_reads_tensors_in_their_stored_dtype(sharded):
    checkpoint = open_checkpoint(sharded)
    read = dict(checkpoint.read_many(["c", "a", "b"]))
    assert set(read) == {"a", "b", "c"}
    for name, tensor in {**A, **B}.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_what_is_read_may_be_changed_without_harm_to_the_file(sharded):
    checkpoint = open_checkpoint(sharded)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), A["a"])


def test_unknown_tensor_is_named(sharded):
    checkpoint = open_checkpoint(sharded)
    for use in (checkpoint.entry, checkpoint.read):
        with pytest.raises(CheckpointError, match="has no tensor called 'nothing'"):
            use("nothing")


def test_file_that_changed_after_opening_is_reported(sharded):
    checkpoint = open_checkpoint(sharded)
    (sharded / "x.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors: .*has it changed"):
        checkpoint.read("a")


def test_digest_sees_config_header_and_size_but_reads_no_weights(sharded, tmp_path):
    original = open_checkpoint(sharded).digest()
    assert original == open_checkpoint(sharded).digest()
    copy = write(tmp_path / "copy", {"x.safetensors": A, "y.safetensors": B})
    assert open_checkpoint(copy).digest() == original
    save_file({"a": A["a"] + 1}, copy / "x.safetensors")
    assert open_checkpoint(copy).digest() == original
    (copy / "config.json").write_text(json.dumps(CONFIG, indent=1))
    with_other_config = open_checkpoint(copy).digest()
    assert with_other_config != original
    save_file({"a": A["a"].int()}, copy / "x.safetensors")  # as many bytes, another header
    assert open_checkpoint(copy).digest() not in (original, with_other_config)


def test_sub_directories_and_unnamed_files_do_not_disturb(sharded):
    (sharded / "fp8kv" / "original").mkdir(parents=True)
    (sharded / "fp8kv" / "original" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(9)}, sharded / "fp8kv" / "kv-stats.safetensors")
    save_file({"a": torch.zeros(9)}, sharded / "consolidated.safetensors")
    assert set(open_checkpoint(sharded).shards) == {"x.safetensors", "y.safetensors"}


def test_an_overlay_of_links_opens_like_any_other(sharded, tmp_path):
    overlay = tmp_path / "overlay"
    scales = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    write(overlay, {"model-kv-scales.safetensors": scales}, index={})
    index = {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}
    index |= dict.fromkeys(scales, "model-kv-scales.safetensors")
    write(overlay, {}, index=index)
    for shard in ("x.safetensors", "y.safetensors"):
        (overlay / shard).symlink_to(sharded / shard)
    checkpoint = open_checkpoint(overlay)
    assert torch.equal(checkpoint.read("a"), A["a"])
    assert set(checkpoint.weight_map) == {"a", "b", "c", *scales}


def test_missing_path(tmp_path):
    assert "does not exist; name a checkpoint directory or a hub id" in refused(tmp_path / "gone")
    assert "the empty path does not exist" in refused("")


def test_home_directory_is_expanded(sharded, monkeypatch):
    monkeypatch.setenv("HOME", str(sharded.parent))
    assert open_checkpoint("~/model").path == sharded


def test_file_in_place_of_a_directory(sharded):
    message = refused(sharded / "config.json")
    assert "is a file; name the directory that holds config.json" in message


def test_revision_of_a_directory(sharded):
    assert "is a directory, which has no revisions" in refused(sharded, "main")


def test_no_config(tmp_path):
    path = write(tmp_path / "model", {"model.safetensors": A}, index={}, config=None)
    assert f"{path} has no config.json" in refused(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"a": ', "is not valid JSON"),
        (b"[1]", "holds a JSON list where an object belongs"),
        (b'{"a": "\xff"}', "is not UTF-8"),
    ],
)
def test_broken_config(sharded, text, expected):
    (sharded / "config.json").write_bytes(text)
    message = refused(sharded)
    assert str(sharded / "config.json") in message
    assert expected in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused(tmp_path, name):
    path = write(tmp_path / "model", {}, index={})
    (path / name).write_bytes(b"")
    message = refused(path)
    assert name in message
    assert "convert them to safetensors" in message


def test_gguf_is_refused(tmp_path):
    path = write(tmp_path / "model", {}, index={}, config=None)
    (path / "model-q4.gguf").write_bytes(b"")
    message = refused(path)
    assert "model-q4.gguf is GGUF" in message
    assert "use the safetensors release" in message


def test_neither_index_nor_single_file(tmp_path):
    path = write(tmp_path / "model", {"model-00001-of-00002.safetensors": A}, index={})
    assert "has neither model.safetensors.index.json nor model.safetensors" in refused(path)


def test_index_names_a_missing_shard(sharded):
    (sharded / "y.safetensors").unlink()
    assert "names the shard y.safetensors, which is missing" in refused(sharded)


def test_shard_that_is_a_dangling_link(sharded):
    (sharded / "y.safetensors").unlink()
    (sharded / "y.safetensors").symlink_to(sharded / "blob")
    assert "names the shard y.safetensors, which is missing" in refused(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../y.safetensors",
        "sub/y.safetensors",
        "/etc/y.safetensors",
        "..\\y.safetensors",
        "C:\\y.safetensors",
        "y\0.safetensors",
        "\ud800.safetensors",
        "y" * 300 + ".safetensors",
    ],
)
def test_index_entry_that_leaves_the_directory(sharded, shard):
    save_file(B, sharded.parent / "y.safetensors")
    write(sharded, {}, index={"a": "x.safetensors", "b": shard})
    message = refused(sharded)
    assert "maps tensor 'b' to" in message
    assert "a shard must be a plain file name" in message


@pytest.mark.parametrize("shard", ["y.bin", "", None, 3, ["y.safetensors"]])
def test_index_entry_that_is_no_safetensors_file(sharded, shard):
    write(sharded, {}, index={"a": "x.safetensors", "b": shard})
    message = refused(sharded)
    assert "maps tensor 'b' to" in message
    assert "which is no safetensors file" in message


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_index_without_weight_map(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    assert "model.safetensors.index.json has no weight_map" in refused(sharded)


def test_index_with_a_tensor_twice(sharded):
    text = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "has the key 'a' twice" in refused(sharded)


def test_index_that_is_not_json(sharded):
    (sharded / "model.safetensors.index.json").write_text("<html>")
    assert "model.safetensors.index.json is not valid JSON" in refused(sharded)


def test_tensor_missing_from_its_shard(sharded):
    write(sharded, {}, index={"a": "x.safetensors", "z": "y.safetensors"})
    message = refused(sharded)
    assert "places tensor 'z' in y.safetensors, which does not hold it" in message


def test_tensor_in_two_shards(tmp_path):
    shards = {"x.safetensors": {**A, "d": torch.ones(1)}, "y.safetensors": {**A, **B}}
    path = write(tmp_path / "model", shards)
    message = refused(path)
    assert "tensor 'a' is in both" in message
    assert "x.safetensors" in message
    assert "y.safetensors" in message


def test_truncated_shard_is_named(sharded):
    content = (sharded / "x.safetensors").read_bytes()
    (sharded / "x.safetensors").write_bytes(content[:-5])
    message = refused(sharded)
    assert "x.safetensors is truncated: 5 of" in message


def test_single_file_beside_an_index_that_agrees(sharded):
    save_file({**A, **B}, sharded / "model.safetensors")
    assert set(open_checkpoint(sharded).shards) == {"x.safetensors", "y.safetensors"}


def test_index_that_names_the_single_file(tmp_path):
    path = write(tmp_path / "model", {"model.safetensors": A})
    assert open_checkpoint(path).weight_map == {"a": "model.safetensors"}


@pytest.mark.parametrize(
    "single",
    [A, {**A, **B, "d": torch.ones(1)}, {**B, "a": torch.zeros(3, 2)}, {**B, "a": A["a"].half()}],
)
def test_single_file_beside_an_index_that_disagrees(sharded, single):
    save_file(single, sharded / "model.safetensors")
    message = refused(sharded)
    assert "which disagree about tensor" in message
    assert "transformers reads the first, engines the second; remove one" in message


def test_hostile_shard_header(sharded):
    (sharded / "x.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert "x.safetensors is no safetensors file" in refused(sharded)


def test_hub_id_is_downloaded(sharded, monkeypatch, tmp_path):
    snapshot = tmp_path / "hub" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    sharded.rename(snapshot)
    calls = []

    def download(repository, *, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    checkpoint = open_checkpoint("org/name", "v1.0")
    assert checkpoint.path == snapshot
    assert checkpoint.source == "org/name"
    assert checkpoint.revision == "0123abcd"
    [(repository, revision, patterns)] = calls
    assert (repository, revision) == ("org/name", "v1.0")
    assert {"*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"} == set(patterns)


def test_a_directory_wins_over_a_hub_id_of_the_same_name(sharded, monkeypatch, tmp_path):
    (tmp_path / "org").mkdir()
    sharded.rename(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_module, "snapshot_download", None)
    assert open_checkpoint("org/name").revision is None


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find the snapshot\nand a second line"),
        ConnectionError("no route to host"),
        ValueError("bad id"),
        RuntimeError(),
    ],
)
def test_failed_download_is_one_sentence(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint_module, "snapshot_download", fail)
    message = refused("org/name")
    assert message.startswith("org/name is neither a directory here nor a hub repository")
    assert "check the name, the revision, the network and your hub login" in message


@pytest.mark.parametrize(
    "name", ["org", "a/b/c", "./org/name", "../name", "org/", "/org/name", "-/"]
)
def test_only_org_slash_name_goes_to_the_hub(monkeypatch, name):
    monkeypatch.setattr(checkpoint_module, "snapshot_download", None)
    assert "does not exist; name a checkpoint directory or a hub id" in refused(name)
