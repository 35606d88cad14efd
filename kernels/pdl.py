"""Programmatic dependent launch: a kernel starts while the one in front of it ends. Needs torch alone.

NVIDIA GPUs have it from compute capability 9.0 on. A kernel launched so waits on the device, before it reads what the
kernel in front may have written, and lets the kernel behind it start early. Elsewhere a launcher's ``pdl=True`` changes
nothing.
"""

from __future__ import annotations

import torch


def uses_pdl(pdl: bool, device: torch.device) -> bool:
    """Say whether a launch on ``device`` is a programmatic dependent one, as ``pdl`` asks."""
    if not pdl or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(overlaps: bool) -> dict[str, bool]:
    """Return what to add to a launch's keywords; GPUs without the feature refuse the keyword itself."""
    return {"launch_pdl": True} if overlaps else {}
