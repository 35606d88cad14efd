"""Write the tables of ``docs/runtime.md`` from the newest committed results.

    python benchmarks/runtime/table.py            # rewrite what stands between the markers
    python benchmarks/runtime/table.py --check    # say whether that would change anything

Needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "runtime.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"(<!-- (\w+): made by table\.py -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    made = with_tables(page, newest_results())
    if arguments.check and made != page:
        raise SystemExit(f"the newest results do not give {PAGE.name}; run make tables")
    PAGE.write_text(made)


def newest_results() -> dict[str, Any]:
    """Return the result of the latest day."""
    return json.loads(max(RESULTS.glob("*-runtime.json")).read_text())


def with_tables(page: str, result: dict[str, Any]) -> str:
    """Return the page with its tables made anew."""
    tables = {"batch": batch_table(result), "slices": slices_table(result)}
    return MARKER.sub(lambda match: match[1] + tables[match[2]] + match[3], page)


def batch_table(result: dict[str, Any]) -> str:
    part = result["llama"]
    lines = [
        f"{result['date']}, {part['gpu']}, commit {result['commit']}, torch {part['torch']}, "
        f"transformers {part['transformers']}; copy {part['copy_tbps']} TB/s, matrix product "
        f"{part['bf16_tflops']} TFLOP/s.",
        "",
        "| | batch, s | of its floor | new tokens/s | decode step, ms | of its floor | host beside the GPU, ms "
        "| sequences of 4224 tokens in 40 GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in part["rows"]:
        beside = row.get("host_ms_beside_gpu", "")
        lines.append(
            f"| {row['runner']} | {row['total_s']:.2f} | {row['total_over_floor']:.2f}x "
            f"| {row['tokens_per_s']:.0f} | {row['step_ms']:.2f} | {row['step_over_floor']:.2f}x "
            f"| {beside} | {row.get('sequences_in_40_GiB', '')} |"
        )
    return "\n".join(lines) + "\n"


def slices_table(result: dict[str, Any]) -> str:
    rows = result["slices"]["rows"]
    lines = [
        "| shape | sequences | tokens each | FP8 cache, ms | BF16 cache, ms | BF16 over FP8 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row["cache"] != "fp8":
            continue
        same = ("shape", "length")
        other = next(
            one for one in rows
            if one["cache"] == "bf16" and all(one[key] == row[key] for key in same)
        )  # fmt: skip
        lines.append(
            f"| {row['shape']} | {row['batch']} | {row['length'] // 1024}K | {row['step_ms']:.2f} "
            f"| {other['step_ms']:.2f} | {other['step_ms'] / row['step_ms']:.2f}x |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
