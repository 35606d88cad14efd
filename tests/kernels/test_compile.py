"""Every kernel compiles for every GPU that it is meant for, and its machine code is what its speed rests on.

No GPU is needed: ``offline.py`` compiles in a process of its own, one per target, without Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

OFFLINE = Path(__file__).with_name("offline.py")
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
pytestmark = pytest.mark.skipif(
    not NVDISASM.exists(), reason="this Triton came without NVIDIA's disassembler"
)
# bytes of shared memory that one block may have, and 32-bit registers of a thread and of all threads of a block
SHARED = {
    "cuda:80": 163 << 10,
    "cuda:89": 99 << 10,
    "cuda:90": 227 << 10,
    "cuda:100": 227 << 10,
    "hip:gfx942": 64 << 10,
}
MOST_REGISTERS = {"cuda": 255, "hip": 512}
BLOCK_REGISTERS = 65536
# the longest first
TARGETS = ["cuda:90", "hip:gfx942", "cuda:80", "cuda:89", "cuda:100"]
# launches whose keys and values are all BF16: without a cache, or over an unquantised one
WITHOUT_CODES = {
    "extend 48/8 1x(0+8K) BF16 new",
    "extend_expanded_mla",
    "extend_unquantised",
    "decode_gqa_unquantised",
    "decode_mla_unquantised",
}
WRITE_KERNELS = ["quantize", "cache_write", "mla_pack", "rope_quantize", "rope_cache_write"]
# bytes of local memory of a thread, in the worse of Triton 3.6 and 3.7
KNOWN_SPILLS = {
    ("cuda:80", "decode_mla H16 B64 L8K"): 72,
    ("cuda:90", "decode_mla H128 B64 L8K"): 152,
    ("cuda:90", "extend_options"): 72,
    ("cuda:90", "extend_unquantised"): 112,
}


def run_offline(target: str) -> list[dict]:
    without = ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment["PYTHONSAFEPATH"] = "1"
    finished = subprocess.run(
        [sys.executable, str(OFFLINE), target],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return [json.loads(line) for line in finished.stdout.splitlines()]


@cache
def runs() -> dict[str, Future]:
    """Start one process per target, as many at a time as there are processors."""
    pool = ThreadPoolExecutor(os.cpu_count())
    return {target: pool.submit(run_offline, target) for target in TARGETS}


def compiled(target: str) -> list[dict]:
    """Return what ``offline.py`` found for the target."""
    return runs()[target].result()


def kernels(target: str) -> list[dict]:
    return [row for row in compiled(target) if "error" not in row]


def launched(target: str, launch: str) -> list[dict]:
    """Return the kernels of the launches whose name begins with ``launch``."""
    found = [row for row in kernels(target) if row["launch"].startswith(launch)]
    assert found, f"nothing called {launch} was compiled for {target}"
    return found


def count(row: dict, pattern: str) -> int:
    """Return how many instructions of a kernel have a mnemonic that matches from its beginning."""
    return sum(n for name, n in row["instructions"].items() if re.match(pattern, name))


@pytest.fixture(params=TARGETS)
def target(request) -> str:
    if request.param.startswith("hip"):
        from triton.backends import backends

        if "amd" not in backends:
            pytest.skip("this Triton has no AMD backend")
    return request.param


def test_every_launch_compiles(target):
    failed = {row["launch"]: row["error"] for row in compiled(target) if "error" in row}
    assert failed == {}, "\n".join(failed.values())
    assert len(kernels(target)) >= 9


def test_nothing_is_spilt_to_local_memory(target):
    found = {
        (target, row["launch"]): row["spilt"]
        for row in kernels(target)
        if row["spilt"] > KNOWN_SPILLS.get((target, row["launch"]), 0)
    }
    assert found == {}


def test_a_block_fits_on_a_multiprocessor(target):
    for row in kernels(target):
        name = (row["launch"], row["kernel"])
        assert row["shared"] <= SHARED[target], name
        assert row["registers"] <= MOST_REGISTERS[target.split(":")[0]], name
        if target.startswith("cuda"):
            assert row["registers"] * row["warps"] * 32 <= BLOCK_REGISTERS, name


@pytest.mark.parametrize("kernel", WRITE_KERNELS)
def test_write_kernels_read_and_write_sixteen_bytes_at_a_time(kernel):
    for row in launched("cuda:90", kernel):
        assert count(row, r"LDG\.E\.(\w+\.)*128") > 0, row["launch"]
        assert count(row, r"STG\.E\.(\w+\.)*(128|64)") > 0, row["launch"]


@pytest.mark.parametrize("kernel", WRITE_KERNELS)
def test_write_kernels_convert_with_the_instruction_of_the_gpu(kernel):
    for row in launched("cuda:90", kernel):
        assert count(row, r"F2FP\.SATFINITE\.E4M3") > 0, row["launch"]


def test_gather_writes_sixteen_bytes_at_a_time_and_reads_the_codes_for_them():
    for row in launched("cuda:90", "gather"):
        assert count(row, r"LDG\.E\.(\w+\.)*(128|64)") > 0, row["launch"]
        assert count(row, r"STG\.E\.(\w+\.)*128") > 0, row["launch"]
        assert count(row, r"STG\.E\.(\w+\.)*(U8|U16)") == 0, row["launch"]


@pytest.mark.parametrize("target", ["cuda:89", "cuda:90"])
def test_decode_gqa_reads_no_single_bytes_from_shared_memory(target):
    """V as the right operand of a matrix product is read byte by byte when it is loaded the plain way."""
    for row in attention(target, "decode_gqa"):
        assert count(row, r"LDS\.U?\.?[US]8") == 0, row["launch"]
        assert count(row, r"LDSM") > 0, row["launch"]


@pytest.mark.parametrize("target", ["cuda:89", "cuda:90"])
@pytest.mark.parametrize("kernel", ["decode_gqa", "decode_mla", "extend"])
def test_attention_reads_the_cache_in_wide_pieces(target, kernel):
    """Sixteen bytes at a time to shared memory or registers, or whole tiles by the copy engine."""
    for row in attention(target, kernel):
        wide = count(row, r"(LDGSTS|LDG)\.E\.(\w+\.)*128") + count(row, r"UTMALDG|UBLKCP")
        assert wide > 0, row["launch"]
        assert count(row, r"LDG\.E\.(\w+\.)*[US]8") == 0, row["launch"]


@pytest.mark.parametrize("kernel", ["decode_gqa", "decode_mla", "extend"])
def test_attention_widens_codes_in_one_step(kernel):
    """FP8 to FP16 is one instruction for two codes and exact; by way of BF16 or float32 it takes several."""
    for row in attention("cuda:90", kernel):
        if row["launch"] not in WITHOUT_CODES:
            assert count(row, r"F2FP\.F16\.E4M3\.UNPACK_B") > 0, row["launch"]
        assert count(row, r"F2F\.BF16") == 0, row["launch"]


@pytest.mark.parametrize("launch", ["decode_mla H128", "extend"])
def test_large_tiles_use_the_matrix_unit_of_hopper(launch):
    for row in attention("cuda:90", launch):
        assert count(row, r"HGMMA") > 0, row["launch"]


def attention(target: str, launch: str) -> list[dict]:
    """Return the kernels of the launches that multiply matrices: all but the combination of splits."""
    found = [row for row in launched(target, launch) if "combine" not in row["kernel"]]
    assert found
    return found
