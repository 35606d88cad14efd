"""Render an evaluation report as Markdown that a user can put into a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from fp8kv.runtime.eval_report import ArmComparison, ArmResult, EvalReport
from fp8kv.runtime.paired import PairedComparison

_LABELS = {
    "bf16": "bf16 (unquantised)",
    "fp8-unit": "fp8-unit (scale 1.0)",
    "fp8": "fp8 (calibrated scales)",
}
_ARM_COLUMNS = (
    "KV cache",
    "strict-match",
    "flexible-extract",
    "NLL",
    "top-1 = reference",
    "top-1 = bf16",
    "KL to bf16, mean",
    "KL to bf16, max",
)
_PAIR_COLUMNS = (
    "KV cache",
    "filter",
    "difference, points",
    "only this right",
    "only bf16 right",
    "both right",
    "neither",
    "p",
)
_LEGEND = (
    "Brackets are 95 % intervals: Wilson's for an accuracy, the paired percentile bootstrap for a "
    "difference. p is McNemar's, exact and two-sided. NLL, top-1 and KL (nats per token) are "
    "teacher-forced on the reference answers."
)


def to_markdown(report: EvalReport) -> str:
    """Return the report as one section: the arms, their comparisons, and what was run."""
    shots = "" if report.shots is None else f" from {_code(report.shots)}"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"### GSM8K by KV cache: {_code(report.model)}",
        "",
        f"{report.n} problems of {_code(report.data)}, {report.num_fewshot}-shot{shots}, greedy, "
        f"at most {report.max_new_tokens} new tokens; FP8 format {report.fp8_format}.",
        "",
        *_table(_ARM_COLUMNS, 1, [_arm_row(name, arm) for name, arm in report.arms.items()]),
        "",
    ]
    if report.comparisons:
        rows = [row for name, pair in report.comparisons.items() for row in _pair_rows(name, pair)]
        lines += ["Against bf16, on the same problems:", "", *_table(_PAIR_COLUMNS, 2, rows), ""]
    lines += [
        _LEGEND,
        "",
        f"Protocol: {report.protocol}, digest `{report.protocol_digest[:16]}`. "
        f"Device: {report.device}, {report.dtype}. Versions: {versions}. "
        f"Time: {report.seconds:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], num_words: int, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table whose first ``num_words`` columns hold words and the others numbers."""
    rule = ["---"] * num_words + ["---:"] * (len(columns) - num_words)
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def _arm_row(name: str, arm: ArmResult) -> list[str]:
    accuracies = [
        f"{accuracy.value:.4f} [{accuracy.ci_low:.4f}, {accuracy.ci_high:.4f}]"
        for accuracy in (arm.strict, arm.flexible)
    ]
    if arm.agreement is None:
        return [_LABELS[name], *accuracies, *["-"] * 5]
    return [
        _LABELS[name],
        *accuracies,
        f"{arm.agreement.nll:.5f}",
        f"{arm.agreement.top1_reference:.5f}",
        f"{arm.agreement.top1_baseline:.5f}",
        _divergence(arm.agreement.kl),
        _divergence(arm.agreement.kl_max),
    ]


def _pair_rows(name: str, pair: ArmComparison) -> list[list[str]]:
    return [
        _pair_row(_LABELS[name], "strict-match", pair.strict),
        _pair_row(_LABELS[name], "flexible-extract", pair.flexible),
    ]


def _pair_row(label: str, filter_name: str, result: PairedComparison) -> list[str]:
    return [
        label,
        filter_name,
        f"{_points(result.difference)} [{_points(result.ci_low)}, {_points(result.ci_high)}]",
        str(result.only_a),
        str(result.only_b),
        str(result.both_right),
        str(result.neither),
        f"{result.p_value:.3f}" if result.p_value >= 0.001 else f"{result.p_value:.1e}",
    ]


def _points(share: float) -> str:
    text = f"{100 * share:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def _divergence(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def _code(text: str) -> str:
    # A backtick would end the code span, a line break the paragraph.
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
