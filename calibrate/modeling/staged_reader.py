"""Read stored tensors to a device, through a small page-locked buffer for each thread.

Safetensors maps files into memory, and what a GPU copies from there passes through a buffer of the driver's. Here it is
read into one that the GPU copies from itself, which is twice as fast, and the host holds no more than that buffer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from io import FileIO

import torch
from torch import Tensor

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.safetensors_file import SafetensorsHeader
from fp8kv.recipes.errors import CheckpointError

STAGING_BYTES = 16 * 2**20

_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class StagedReader:
    """Reads tensors of one checkpoint; any number of threads may do so at once.

    Peak memory: what is returned; and, for a device that is not the CPU, :data:`STAGING_BYTES` of the host for each
    thread.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Open nothing yet: a shard is opened when the first of its tensors is read."""
        self._checkpoint = checkpoint
        self._files: dict[str, FileIO] = {}
        self._is_closed = False
        self._lock = threading.Lock()
        self._local = threading.local()

    def close(self) -> None:
        """Close the shards; a thread that reads on gets a :class:`ValueError`."""
        with self._lock:
            self._is_closed = True
            for file in self._files.values():
                file.close()

    def read(self, name: str, device: torch.device) -> Tensor:
        """Return the tensor called ``name`` in its stored dtype, on ``device``.

        Raises:
            CheckpointError: there is no such tensor, it cannot be read, or its shard is no more what was opened.
        """
        entry = self._checkpoint.entry(name)
        header = self._checkpoint.shards[self._checkpoint.weight_map[name]]
        data = torch.empty(entry.end - entry.start, dtype=torch.uint8, device=device)
        try:
            file = self._open(header)
            for start in range(0, len(data), STAGING_BYTES):
                piece = data[start : start + STAGING_BYTES]
                host = piece if device.type == "cpu" else self._staging(device)[: len(piece)]
                _fill(host, file, header.data_start + entry.start + start)
                if host is not piece:
                    piece.copy_(host)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"cannot read {header.path}: {error}; has it changed since it was opened?"
            ) from error
        return data.view(_TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def _open(self, header: SafetensorsHeader) -> FileIO:
        with self._lock:
            if self._is_closed:
                raise ValueError("the reader is closed")
            file = self._files.get(header.path.name)
            if file is None:
                if header.path.stat().st_size != header.file_size:
                    raise EOFError(f"its size is not {header.file_size} bytes any more")
                file = FileIO(header.path)
                self._files[header.path.name] = file
            return file

    def _staging(self, device: torch.device) -> Tensor:
        if not hasattr(self._local, "staging"):
            self._local.staging = torch.empty(
                STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda"
            )
        return self._local.staging  # type: ignore[no-any-return]


def _fill(host: Tensor, file: FileIO, offset: int) -> None:
    """Read as many bytes as ``host`` holds."""
    view = host.numpy().data
    while view:
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise EOFError(f"it ends at byte {offset}")
        view = view[count:]
        offset += count
