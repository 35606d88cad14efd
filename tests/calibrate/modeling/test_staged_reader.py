"""Tensors are read as they are stored, in pieces, and shards are closed again."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.safetensors_file import DTYPE_BITS
from fp8kv.calibrate.modeling import staged_reader
from fp8kv.calibrate.modeling.load import load_model
from fp8kv.calibrate.modeling.staged_reader import StagedReader
from fp8kv.recipes.errors import CheckpointError

CPU = torch.device("cpu")
NO_WEIGHTS = {"F4", "F6_E2M3", "F6_E3M2", "C64"}  # refused before anything is read


def open_with(path, tensors):
    (path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    save_file(tensors, path / "model.safetensors")
    return open_checkpoint(path)


@pytest.mark.parametrize("piece", [3, 2**24])
@pytest.mark.parametrize("name", sorted(set(DTYPE_BITS) - NO_WEIGHTS))
def test_every_dtype_and_shape_is_read_as_stored(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(staged_reader, "STAGING_BYTES", piece)
    dtype = staged_reader._TORCH_DTYPES[name]
    size = dtype.itemsize
    tensors = {
        "matrix": torch.arange(1, 1 + 15 * size).to(torch.uint8).view(dtype).view(3, 5),
        "scalar": torch.ones(size, dtype=torch.uint8).view(dtype).view(()),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    if dtype == torch.bool:
        tensors["matrix"] = torch.arange(15).view(3, 5) % 2 == 1
    checkpoint = open_with(tmp_path, tensors)
    assert {checkpoint.entry(tensor).dtype for tensor in tensors} == {name}
    reader = StagedReader(checkpoint)
    for tensor, expected in tensors.items():
        found = reader.read(tensor, CPU)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        same = found.reshape(-1).view(torch.uint8) == expected.reshape(-1).view(torch.uint8)
        assert same.all()
        assert found.untyped_storage().nbytes() == expected.nbytes
    reader.close()


def test_a_shard_of_another_size_is_no_more_what_was_opened(tmp_path):
    checkpoint = open_with(tmp_path, {"a": torch.zeros(4)})
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    reader = StagedReader(checkpoint)
    for _ in range(2):  # not only when the shard is opened
        with pytest.raises(CheckpointError) as error:
            reader.read("a", CPU)
        assert str(error.value) == (
            f"cannot read {tmp_path / 'model.safetensors'}: its size is not "
            f"{checkpoint.shards['model.safetensors'].file_size} bytes any more; "
            "has it changed since it was opened?"
        )
    reader.close()


def test_a_shard_that_is_truncated_while_it_is_read_is_said_so(tmp_path):
    checkpoint = open_with(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)})
    reader = StagedReader(checkpoint)
    reader.read("a", CPU)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(
        CheckpointError, match=r"cannot read .*: it ends at byte \d+; has it changed"
    ):
        reader.read("b", CPU)
    reader.close()
    with pytest.raises(ValueError, match="the reader is closed"):
        reader.read("a", CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_whole", [True, False])
def test_shards_are_closed_after_a_load_and_after_a_failure(
    tiny_checkpoint, quantised_models, tmp_path, is_whole
):
    path = tmp_path / "int4"
    quantised_models.save_int4(tiny_checkpoint("llama"), path)
    if is_whole:
        load_model(open_checkpoint(path), dtype=torch.float32, device="cpu")
    else:
        quantised_models.set_config(path, intermediate_size=31)
        with pytest.raises(CheckpointError, match="have other shapes"):
            load_model(open_checkpoint(path), dtype=torch.float32, device="cpu")
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not any(str(path) in link for link in links)
