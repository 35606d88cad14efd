"""Run the benchmarks of the runtime one after the other, each in a process of its own, and write one JSON file.

    python -m benchmarks.runtime.run --out benchmarks/results

Run at the root of the repository (``make bench`` does). Needs a GPU of 120 GB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..commit import commit_id

BENCHMARKS = ("llama", "slices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file, or a folder for DATE-GPU-runtime.json")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"These are times of a GPU, and torch {torch.__version__} finds none.")
    gpu = torch.cuda.get_device_name()
    date = datetime.date.today().isoformat()
    parts, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            part = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.runtime.{name}", "--out", str(part)]
            if subprocess.run(command, check=False).returncode:
                failed.append(name)
            else:
                parts[name] = json.loads(part.read_text())
    result = {"benchmark": "runtime", "date": date, "gpu": gpu, "commit": commit_id(), **parts}
    if arguments.out:
        out = arguments.out
        if out.suffix != ".json":
            short = gpu.lower().removeprefix("nvidia ").replace(" ", "-")
            out = out / f"{date}-{short}-runtime.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        sys.exit(f"{', '.join(failed)} did not finish.")


if __name__ == "__main__":
    main()
