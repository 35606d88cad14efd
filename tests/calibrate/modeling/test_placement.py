"""Device and dtype of the forward passes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling.placement import resolve_device, resolve_dtype
from fp8kv.recipes.errors import CalibrationError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def checkpoint(tmp_path):
    def make(**config):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
        save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
        return open_checkpoint(tmp_path)

    return make


@pytest.mark.parametrize(("present", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, present, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert resolve_device("auto") == torch.device(expected)


def test_a_named_device_is_taken():
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_named_with_torchs_reason(device):
    with pytest.raises(CalibrationError) as error:
        resolve_device(device)
    message = str(error.value)
    assert message.startswith(f"device {device!r} cannot be used here: ")
    assert "\n" not in message
    assert not message.endswith(": ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
)
@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_named_dtype_is_taken_everywhere(checkpoint, name, expected, device):
    assert resolve_dtype(name, checkpoint(dtype="float32"), device) == expected


def test_auto_is_float32_on_a_cpu(checkpoint):
    assert resolve_dtype("auto", checkpoint(dtype="bfloat16"), CPU) == torch.float32


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"text_config": {"model_type": "x", "dtype": "float16"}}, torch.float16),
        ({}, torch.bfloat16),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
    ],
)
def test_auto_on_a_gpu_is_the_checkpoints_own_or_bfloat16(checkpoint, config, expected):
    assert resolve_dtype("auto", checkpoint(**config), GPU) == expected
