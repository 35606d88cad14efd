"""Write the tables of ``docs/kernels.md`` from the committed results of this project's kernels and of the peers'.

    python benchmarks/kernels/table.py            # rewrite what stands between the markers
    python benchmarks/kernels/table.py --check    # say whether that would change anything

Needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
PEERS = RESULTS / "peers-h200.json"
MARKER = re.compile(r"(<!-- (\w+): made by table\.py -->\n).*?(<!-- end -->)", re.DOTALL)
# rounding a value to bfloat16 once leaves this much; write kernels have to match bit for bit
LARGEST_ERRORS = {
    "gather": 1.7e-3,
    "quantize": 0.0,
    "cache_write": 0.0,
    "mla_pack": 0.0,
}

Row = dict[str, Any]


def main() -> None:
    """Rewrite the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    made = with_tables(page, newest_results(), json.loads(PEERS.read_text()))
    if arguments.check and made != page:
        raise SystemExit(
            f"{PEERS.name} and the newest results do not give {PAGE.name}; run make tables"
        )
    PAGE.write_text(made)


def newest_results() -> Row | None:
    """Return the newest committed run, by the date in its name; ``None`` before the first."""
    files = sorted(RESULTS.glob("20*-kernels.json"))
    return json.loads(files[-1].read_text()) if files else None


def with_tables(page: str, ours: Row | None, peers: Row) -> str:
    """Return the page with everything between its markers made anew."""

    def made(match: re.Match[str]) -> str:
        name = match.group(2)
        text = _run(ours, peers) if name == "run" else _kernel(name, ours, peers)
        return f"{match.group(1)}{text}{match.group(3)}"

    return MARKER.sub(made, page)


def same_class(kernel: str, peer: Row) -> bool:
    """Say whether a peer solves the same task as exactly: FP8 cache and BF16 query, or the reference's codes."""
    if "cache" in peer:
        return bool(peer["cache"] == "fp8" and peer["query"] == "bf16")
    return peer["error"] is not None and peer["error"] <= LARGEST_ERRORS[kernel]


def is_met(row: Row) -> bool:
    """Say whether a row's time is within its target, to the three digits that the tables show."""
    return float(number(row["time_us"])) <= float(number(row["target_us"]))


def _run(ours: Row | None, peers: Row) -> str:
    """Describe the two runs."""
    versions = ", ".join(f"{name} {version}" for name, version in peers["peers"].items())
    theirs = (
        f"Peers: {versions}; on one {peers['gpu']}, torch {peers['torch']}, triton {peers['triton']}; "
        f"{_ceilings(peers['ceilings'])}.\n"
    )
    if ours is None:
        return f"No run of fp8kv's kernels is committed yet.\n\n{theirs}"
    return (
        f"fp8kv: {ours['date']}, commit {ours['commit']}, on one {ours['gpu']}, torch {ours['torch']}, "
        f"triton {ours['triton']}; {_ceilings(ours['ceilings'])}.\n\n{theirs}"
    )


def _ceilings(ceilings: Row) -> str:
    return (
        f"copy {ceilings['copy_tbps']:.2f} TB/s, read {ceilings['read_tbps']:.2f} TB/s, "
        f"BF16 matrix product {ceilings['bf16_tflops']:.0f} TFLOP/s, "
        f"one graph node {ceilings['graph_node_us']:.2f} us"
    )


def _kernel(kernel: str, ours: Row | None, peers: Row) -> str:
    """Make the table of one kernel and a line below it that counts."""
    rows = [row for row in (ours or {"rows": []})["rows"] if row["kernel"] == kernel]
    failed = [row for row in (ours or {"failures": []})["failures"] if row["kernel"] == kernel]
    if not rows and not failed:
        return "Not timed yet.\n"
    theirs = {
        shape["shape"]: shape["peers"] for shape in peers["shapes"] if shape["kernel"] == kernel
    }
    lines = [
        "| shape | us | of the floor | error | target | best peer of the class | best of all peers |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        lines.append(_line(row, theirs.get(row["shape"], [])))
    for row in failed:
        lines.append(f"| {row['shape']} | not timed: {row['why']} | | | | | |")
    count = _count(rows, theirs)
    return "\n".join([*lines, "", count, ""] if count else [*lines, ""])


def _line(row: Row, peers: list[Row]) -> str:
    alike = [peer for peer in peers if same_class(row["kernel"], peer)]
    best, best_alike = _fastest(peers), _fastest(alike)
    other = best if best is not best_alike else None
    cells = [
        row["shape"],
        number(row["time_us"]),
        _share(row),
        _error(row["error"]),
        _target(row),
        _peer(best_alike, row),
        _peer(other, row, with_error=True),
    ]
    return f"| {' | '.join(cells)} |"


def _share(row: Row) -> str:
    text = f"{100 * row['fraction']:.1f} % {row['bound']}"
    if row["bound"] == "mem":
        return text
    return f"{text}, {row['flops'] / row['time_us'] / 1e6:.0f} TFLOP/s"


def _target(row: Row) -> str:
    if row["target"] is None:
        return ""
    return f"{row['target']}{'' if is_met(row) else ' **missed**'}"


def _peer(peer: Row | None, row: Row, with_error: bool = False) -> str:
    if peer is None:
        return ""
    times = peer["time_us"] / row["time_us"]
    factor = f"{times:.2f}x" if times >= 1 else f"**{times:.2f}x**"
    text = f"{number(peer['time_us'])} {peer['peer']}, {factor}"
    if not with_error:
        return text
    if peer.get("cache") == "bf16":
        return f"{text}, BF16 cache"
    return f"{text}, error {_error(peer['error'])}"


def _count(rows: list[Row], theirs: dict[str, list[Row]]) -> str:
    """Say how many targets are met and where a peer of the same class is faster."""
    with_target = [row for row in rows if row["target"] is not None]
    met = sum(is_met(row) for row in with_target)
    slower = []
    compared = 0
    for row in rows:
        best = _fastest(
            [peer for peer in theirs.get(row["shape"], []) if same_class(row["kernel"], peer)]
        )
        compared += best is not None
        if best is not None and best["time_us"] < row["time_us"]:
            slower.append(row["shape"])
    text = f"{met} of {len(with_target)} targets met." if with_target else ""
    if slower:
        text += f" Slower than the best peer of the class at {', '.join(slower)}."
    elif compared:
        text += f" At none of the {compared} shapes is a peer of the class faster."
    return text.strip()


def _fastest(peers: list[Row]) -> Row | None:
    return min(peers, key=lambda peer: peer["time_us"], default=None)


def number(value: float) -> str:
    """Return microseconds with three significant digits, or all before the point."""
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _error(value: float | None) -> str:
    if value is None:
        return "?"
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


if __name__ == "__main__":
    main()
