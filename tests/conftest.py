"""What the tests of several rooms share: models to test on, and the guard that no test leaves this machine."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Without a GPU the kernels' addressing is judged in Triton's interpreter, which must be chosen before Triton is imported.
HAS_GPU = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with all that is made of it. Tests share it and leave it as it is."""

    path: Path
    checkpoint: Any
    facts: Any
    model: Any
    tokenizer: Any


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none; where there is one, the kernels' tests all use it."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif HAS_GPU and item.path.parent.name == "kernels" and item.path.stem != "test_compile":
            item.add_marker("gpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``architecture`` once for each of the tiny models."""
    own = [str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")]
    if "architecture" in metafunc.fixturenames and not any(
        "architecture" in names for names in own
    ):
        metafunc.parametrize("architecture", list(_helper("tiny_models").TINY_MODELS))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random numbers; tests that need none do not import torch for it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that connects to, or looks up, anything but this machine."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            _require_loopback(address[0])
        connect(self, address)

    def guarded_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        _require_loopback(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """The module ``tiny_models``."""
    return _helper("tiny_models")


@pytest.fixture(scope="session")
def quantised_models() -> ModuleType:
    """The module ``quantised_models``."""
    return _helper("quantised_models")


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """The module ``planted``."""
    return _helper("planted")


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: ModuleType
) -> Callable[[str], Path]:
    """Give the directory of a tiny float32 checkpoint by its ``model_type``; it is made once and not to be changed."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            directory = tmp_path_factory.mktemp("tiny") / model_type
            tiny_models.save_tiny_model(model_type, directory)
            made[model_type] = directory
        return made[model_type]

    return get


@pytest.fixture(scope="session")
def load() -> Callable[[Path], Loaded]:
    """Load a checkpoint in float32 on the CPU."""
    import torch

    from fp8kv.calibrate.formats.checkpoint import open_checkpoint
    from fp8kv.calibrate.formats.facts import model_facts
    from fp8kv.calibrate.modeling.load import load_model, load_tokenizer

    def get(path: Path) -> Loaded:
        checkpoint = open_checkpoint(path)
        model = load_model(checkpoint, dtype=torch.float32, device="cpu")
        return Loaded(path, checkpoint, model_facts(checkpoint), model, load_tokenizer(checkpoint))

    return get


@pytest.fixture(scope="session")
def minimax(load: Callable[[Path], Loaded]) -> Loaded:
    """The embedded trained MiniMax-M2 model, an FP8 checkpoint."""
    from fp8kv.demo import MODELS

    return load(MODELS["tiny-minimax-m2"])


@pytest.fixture(scope="session")
def deepseek(load: Callable[[Path], Loaded]) -> Loaded:
    """The embedded trained DeepSeek-V3 model, an FP8 checkpoint."""
    from fp8kv.demo import MODELS

    return load(MODELS["tiny-deepseek-v3"])


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    """Keep progress bars out of the tests' output."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _helper(name: str) -> ModuleType:
    """Import a module that lies beside this one; under importlib mode there is no package to import it from."""
    full_name = f"fp8kv_tests_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            full_name, Path(__file__).with_name(f"{name}.py")
        )
        if spec is None or spec.loader is None:
            raise ImportError(name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]


def _require_loopback(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        is_local = ipaddress.ip_address(name).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        # a failure is no Exception, so that code which retries or falls back does not swallow it
        pytest.fail(f"this test wants to reach {name}; tests run without a network")
