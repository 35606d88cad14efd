"""Which state of the repository was timed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit_id() -> str:
    """Return the commit that is timed, with a ``+`` where files differ from it; ``FP8KV_COMMIT`` where there is no git."""
    if "FP8KV_COMMIT" in os.environ:
        return os.environ["FP8KV_COMMIT"]
    root = Path(__file__).resolve().parents[1]
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changes else "")
