"""Compile what the launchers launch, for a GPU that need not be there; run as a program by ``test_compile``.

    python tests/kernels/offline.py cuda:90

The launchers get tensors that have a shape, strides and a device but no data, and a driver that names the target
and launches nothing. So the signature, the compile-time constants and the options are those of production, and a launcher
that reads a value from the device (``.item()``) fails here. Prints one JSON object per kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]
TIMED = {
    "quantize": ["8192x7168", "64x576"],
    "cache_write": ["8x128 K+V T8192", "8x128 K+V T1"],
    "mla_pack": ["MLA576 T8192"],
    "mla_pack_kv": ["128 heads T8192"],
    "rope_quantize": ["MLA 128x192 T8192", "48/8 d128 T8192"],
    "rope_cache_write": [
        "32/8 d128 T8192",
        "48/8 d128 half rotated T64",
        "32/8 d128 interleaved T8192",
    ],
    "gather": ["64x4K 8x128 K+V", "64x4K MLA576"],
    "decode_gqa": ["48/8 B64 L8K", "8/1 B1 L64K", "16/4 B64 L8K d256"],
    "decode_mla": ["H16 B64 L8K", "H128 B64 L8K"],
    "extend": ["48/8 8x(8K+512)", "48/8 1x(0+8K) BF16 new"],
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# multiprocessors, and bytes of shared memory that a block may have
GPUS = {
    "cuda:80": (108, 166912),
    "cuda:89": (142, 101376),
    "cuda:90": (132, 232448),
    "cuda:100": (148, 232448),
    "hip:gfx942": (304, 65536),
}
DISASSEMBLED = (89, 90)
# an address in the listing, perhaps a predicate, the mnemonic: LDS.U8, LDG.E.128, HGMMA.64x64x16.F32
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9][A-Za-z0-9_.]+)", re.M
)


class GpuTensor(torch.Tensor):
    """A tensor without data that says it lies on the GPU: the real one is on torch's device ``meta``, at address 0."""

    is_cuda = True
    device = torch.device("cuda", 0)


class GpuTensors(TorchFunctionMode):
    """While it is active, every tensor that torch makes is a ``GpuTensor``."""

    def __torch_function__(
        self, function: Callable, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        arguments, keywords = tree_map(as_meta_tensor, (arguments, dict(keywords or {})))
        if keywords.get("device") is not None:
            keywords["device"] = "meta"
        return tree_map(as_gpu_tensor, function(*arguments, **keywords))


def as_meta_tensor(value: Any) -> Any:
    return value.as_subclass(Tensor) if type(value) is GpuTensor else value


def as_gpu_tensor(value: Any) -> Any:
    return value.as_subclass(GpuTensor) if type(value) is Tensor else value


class OfflineDriver:
    """A driver without a GPU: it knows what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def pretend(target: GPUTarget, name: str, compiled: list[tuple[str, Any]]) -> None:
    """Make torch and Triton believe in one GPU of this kind, and every launch a compilation."""
    driver.set_active(OfflineDriver(target))
    if target.backend == "cuda":
        capability = divmod(target.arch, 10)
    else:
        capability, torch.version.hip = (9, 4), "7.0"
    multiprocessors, shared_memory = GPUS[name]
    properties = SimpleNamespace(
        multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=shared_memory,
        major=capability[0],
        minor=capability[1],
        gcnArchName=str(target.arch),
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only


def facts(kernel: Any) -> dict[str, Any]:
    """Return the resources and the instructions of a compiled kernel."""
    found = {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    if "cubin" in kernel.asm:
        return found | nvidia_facts(
            kernel.asm["cubin"], kernel.metadata.target.arch in DISASSEMBLED
        )
    text = kernel.asm["amdgcn"]
    for name, key in {
        "registers": "vgpr_count",
        "spilt": "vgpr_spill_count",
        "spilt_scalars": "sgpr_spill_count",
    }.items():
        found[name] = int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
    return found | {"instructions": {}}


def nvidia_facts(cubin: bytes, disassemble: bool) -> dict[str, Any]:
    """Ask the tools that Triton brings: registers, bytes of local memory, how often each instruction stands there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        assembly = run_tool("nvdisasm", "-c", file.name) if disassemble else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilt": int(stack),
        "instructions": Counter(INSTRUCTION.findall(assembly)),
    }


def run_tool(name: str, *arguments: str) -> str:
    command = [str(NVIDIA_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def launches(all_of_them: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name of each launch and the launch: what the benchmarks time, and options that they do not use."""
    for kernel, shapes in TIMED.items():
        for shape in shapes if all_of_them else shapes[:1]:
            yield f"{kernel} {shape}", partial(launch_timed, kernel, shape)
    if all_of_them:
        for launch in (
            cache_write_options,
            decode_gqa_options,
            extend_options,
            extend_expanded_mla,
            decode_gqa_unquantised,
            partial(decode_mla_unquantised, 16),
            partial(decode_mla_unquantised, 128),
            extend_unquantised,
        ):
            yield getattr(launch, "__name__", "decode_mla_unquantised"), launch


def launch_timed(kernel: str, shape: str) -> None:
    cases = importlib.import_module(f"benchmarks.kernels.{kernel}").cases()
    case = next(case for case in cases if case.shape == shape)
    case.build(1, True).calls[0]()


def cache_write_options() -> None:
    """Scales per head, V narrower than K, heads before tokens in a page, the map of a sliding window."""
    from fp8kv.kernels.cache_write import cache_write

    key, value = (empty(256, 8, width, dtype=torch.bfloat16) for width in (192, 128))
    caches = [codes(64, 8, 16, width).transpose(1, 2) for width in (192, 128)]
    slots, slot_map = (empty(length, dtype=torch.int32) for length in (256, 1024))
    cache_write(key, value, *caches, slots, empty(8), empty(8), slot_map=slot_map)


def decode_gqa_options() -> None:
    from fp8kv.kernels.decode_gqa import decode_gqa

    tables, lengths = empty(4, 512, dtype=torch.int32), empty(4, dtype=torch.int32)
    decode_gqa(
        empty(4, 32, 192, dtype=torch.bfloat16),
        codes(2048, 64, 8, 192),
        codes(2048, 64, 8, 128),
        tables,
        lengths,
        empty(8),
        empty(8),
        sm_scale=0.07,
        max_seq_len=32768,
        window=4096,
        soft_cap=30.0,
        sinks=empty(32),
        out_dtype=torch.float32,
        lse=empty(4, 32),
    )


def extend_options() -> None:
    """New tokens as FP8 codes beside the cache, and every option."""
    from fp8kv.kernels.extend import extend

    extend(
        empty(1024, 32, 128, dtype=torch.bfloat16),
        codes(1024, 8, 128),
        codes(1024, 8, 128),
        codes(2048, 16, 8, 128),
        codes(2048, 16, 8, 128),
        empty(2, 1024, dtype=torch.int32),
        empty(2, dtype=torch.int32),
        empty(3, dtype=torch.int32),
        empty(8),
        empty(8),
        sm_scale=0.09,
        max_new_tokens=512,
        max_prefix_len=16384,
        window=4096,
        soft_cap=30.0,
        sinks=empty(32),
        out_dtype=torch.float32,
        lse=empty(1024, 32),
    )


def extend_expanded_mla() -> None:
    """Prefill of MLA: K of 128 + 64, V of 128, a KV head for each query head, no prefix."""
    from fp8kv.kernels.extend import extend

    query, key = (empty(1024, 16, 192, dtype=torch.bfloat16) for _ in range(2))
    extend(
        query,
        key,
        empty(1024, 16, 128, dtype=torch.bfloat16),
        None,
        None,
        None,
        empty(2, dtype=torch.int32),
        empty(3, dtype=torch.int32),
        empty(1),
        empty(1),
        sm_scale=0.07,
        max_new_tokens=1024,
        max_prefix_len=0,
    )


def decode_gqa_unquantised() -> None:
    from fp8kv.kernels.decode_gqa import decode_gqa

    cache = empty(2048, 16, 8, 128, dtype=torch.bfloat16)
    decode_gqa(
        empty(4, 32, 128, dtype=torch.bfloat16),
        cache,
        cache,
        empty(4, 512, dtype=torch.int32),
        empty(4, dtype=torch.int32),
        empty(1),
        empty(1),
        sm_scale=0.09,
        max_seq_len=8192,
    )


def decode_mla_unquantised(heads: int) -> None:
    from fp8kv.kernels.decode_mla import decode_mla

    decode_mla(
        empty(4, heads, 576, dtype=torch.bfloat16),
        empty(2048, 64, 576, dtype=torch.bfloat16),
        empty(4, 512, dtype=torch.int32),
        empty(4, dtype=torch.int32),
        empty(1),
        sm_scale=0.07,
        max_seq_len=8192,
    )


def extend_unquantised() -> None:
    """Chunked prefill over BF16 pages that hold the new tokens already."""
    from fp8kv.kernels.extend import extend

    cache = empty(2048, 16, 8, 128, dtype=torch.bfloat16)
    extend(
        empty(1024, 32, 128, dtype=torch.bfloat16),
        None,
        None,
        cache,
        cache,
        empty(2, 1024, dtype=torch.int32),
        empty(2, dtype=torch.int32),
        empty(3, dtype=torch.int32),
        empty(1),
        empty(1),
        sm_scale=0.09,
        max_new_tokens=512,
        max_prefix_len=16384,
    )


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def codes(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float8_e4m3fn)


def compile_one(launch: str, call: Callable[[], object], compiled: list[tuple[str, Any]]) -> None:
    """Print what is known of each kernel of one launch, or what the launch raised."""
    try:
        call()
        rows = [{"launch": launch, "kernel": name} | facts(kernel) for name, kernel in compiled]
    except Exception:  # noqa: BLE001  whatever it is, the test shows it
        rows = [{"launch": launch, "error": traceback.format_exc()[-2000:]}]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def main() -> None:
    name = sys.argv[1]
    sys.path.append(str(ROOT))
    backend, arch = name.split(":")
    target = (
        GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    )
    compiled: list[tuple[str, Any]] = []
    pretend(target, name, compiled)
    with GpuTensors():
        # what a compiler sets up at its first kernel is set up for all
        next(launches(False))[1]()
        compiled.clear()
        for launch, call in launches(target.arch == 90):
            # a compiler that fails an assertion of its own ends the process: let it be another one
            child = os.fork()
            if child == 0:
                compile_one(launch, call, compiled)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status:
                row = {"launch": launch, "error": f"the compiler ended with status {status}"}
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
