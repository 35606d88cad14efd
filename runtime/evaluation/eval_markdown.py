"""Render an evaluation report as Markdown that a user can put into a pull request."""

from __future__ import annotations

from collections.abc import Mapping

from fp8kv.runtime.evaluation.agreement import AgreementSummary
from fp8kv.runtime.evaluation.agreement_eval import AgreementSection
from fp8kv.runtime.evaluation.eval_report import EvalReport
from fp8kv.runtime.evaluation.gsm8k_section import Gsm8kArm, Gsm8kComparison, Gsm8kSection
from fp8kv.runtime.evaluation.lm_eval_adapter import TaskResults
from fp8kv.runtime.evaluation.markdown import code, p_value, points, small, table
from fp8kv.runtime.evaluation.needle_eval import NeedleArm, NeedleSection
from fp8kv.runtime.evaluation.paired import Accuracy, PairedComparison
from fp8kv.runtime.evaluation.perplexity_eval import PerplexityArm, PerplexitySection
from fp8kv.runtime.evaluation.tasks_eval import TasksSection

_LABELS = {
    "bf16": "bf16 (unquantised)",
    "fp8-unit": "fp8-unit (scale 1.0)",
    "fp8": "fp8 (calibrated scales)",
    "emulate": "emulate (calibrated scales)",
}
_AGREEMENT_COLUMNS = (
    "NLL",
    "top-1 = reference",
    "top-1 = bf16",
    "KL to bf16, mean",
    "KL to bf16, max",
)
_PAIR_COLUMNS = (
    "difference, points",
    "only this right",
    "only bf16 right",
    "both right",
    "neither",
    "p",
)


def to_markdown(report: EvalReport) -> str:
    """Return the report as one section: a table or two for each measurement, and what was run."""
    sections = report.sections
    lines = [f"### Accuracy by KV cache: {code(report.model)}", ""]
    if sections.gsm8k is not None:
        lines += _gsm8k(sections.gsm8k)
    if sections.perplexity is not None:
        lines += _perplexity(sections.perplexity)
    if sections.agreement is not None:
        lines += _agreement(sections.agreement)
    if sections.needle is not None:
        lines += _needle(sections.needle)
    if sections.tasks is not None:
        lines += _tasks(sections.tasks)
    if report.expectations:
        lines += _expectations(report)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines.append(
        "Brackets are 95 % intervals: Wilson's for a share, the paired percentile bootstrap for a difference or a "
        f"ratio. FP8 format {report.fp8_format}. Device: {report.device}, {report.dtype}, {report.backend} backend. "
        f"Versions: {versions}. Time: {report.seconds:.0f} s."
    )
    return "\n".join(lines) + "\n"


def _gsm8k(section: Gsm8kSection) -> list[str]:
    shots = "" if section.shots is None else f" from {code(section.shots)}"
    columns = ("KV cache", "strict-match", "flexible-extract", *_AGREEMENT_COLUMNS)
    lines = [
        f"**GSM8K.** {section.n} problems of {code(section.data)}, {section.num_fewshot}-shot{shots}, greedy, "
        f"at most {section.max_new_tokens} new tokens; {section.protocol}, digest "
        f"{code(section.protocol_digest[:16])}. NLL, top-1 and KL (nats per token) are teacher-forced on the "
        "reference answers.",
        "",
        *table(columns, 1, [_gsm8k_row(name, arm) for name, arm in section.arms.items()]),
        "",
    ]
    if section.comparisons:
        rows = [
            row for name, pair in section.comparisons.items() for row in _gsm8k_pair(name, pair)
        ]
        lines += [
            "Against bf16, on the same problems; p is McNemar's, exact and two-sided:",
            "",
            *table(("KV cache", "filter", *_PAIR_COLUMNS), 2, rows),
            "",
        ]
    return lines


def _gsm8k_row(name: str, arm: Gsm8kArm) -> list[str]:
    agreement = ["-"] * len(_AGREEMENT_COLUMNS)
    if arm.agreement is not None:
        agreement = _agreement_cells(arm.agreement)
    return [_LABELS[name], _accuracy(arm.strict), _accuracy(arm.flexible), *agreement]


def _gsm8k_pair(name: str, pair: Gsm8kComparison) -> list[list[str]]:
    return [
        [_LABELS[name], "strict-match", *_pair_cells(pair.strict)],
        [_LABELS[name], "flexible-extract", *_pair_cells(pair.flexible)],
    ]


def _perplexity(section: PerplexitySection) -> list[str]:
    columns = ("KV cache", "perplexity", "NLL", "bits per byte", "ratio to bf16")
    return [
        f"**Perplexity.** {section.num_tokens} tokens of {code(section.data)}, in windows of {section.context} of "
        f"which each scores {section.stride}; digest {code(section.protocol_digest[:16])}.",
        "",
        *table(columns, 1, [_perplexity_row(name, arm) for name, arm in section.arms.items()]),
        "",
    ]


def _perplexity_row(name: str, arm: PerplexityArm) -> list[str]:
    ratio = "-"
    if arm.ratio is not None:
        ratio = f"{arm.ratio.value:.5f}"
        if arm.ratio.ci_low is not None and arm.ratio.ci_high is not None:
            ratio += f" [{arm.ratio.ci_low:.5f}, {arm.ratio.ci_high:.5f}]"
    return [
        _LABELS[name],
        f"{arm.perplexity:.4f}",
        f"{arm.nll:.5f}",
        f"{arm.bits_per_byte:.5f}",
        ratio,
    ]


def _agreement(section: AgreementSection) -> list[str]:
    rows = []
    for name, arm in section.arms.items():
        rows.append([_LABELS[name], "all", *_agreement_row(arm.total)])
        for bucket in arm.buckets if name != "bf16" else ():
            position = f"{bucket.first} to {bucket.last}"
            rows.append([_LABELS[name], position, *_agreement_row(bucket.agreement)])
    columns = ("KV cache", "tokens before", "compared", *_AGREEMENT_COLUMNS)
    return [
        f"**Agreement.** {section.num_windows} windows of {section.context} tokens of {code(section.data)}, "
        f"teacher-forced; digest {code(section.protocol_digest[:16])}. KL in nats per token.",
        "",
        *table(columns, 2, rows),
        "",
    ]


def _agreement_row(agreement: AgreementSummary) -> list[str]:
    return [str(agreement.num_tokens), *_agreement_cells(agreement)]


def _agreement_cells(agreement: AgreementSummary) -> list[str]:
    return [
        f"{agreement.nll:.5f}",
        f"{agreement.top1_reference:.5f}",
        f"{agreement.top1_baseline:.5f}",
        small(agreement.kl),
        small(agreement.kl_max),
    ]


def _needle(section: NeedleSection) -> list[str]:
    summary = ("KV cache", "recall", "log-probability", "top-1", *_PAIR_COLUMNS)
    grid = ("KV cache", "length", *(f"{depth:.0%}" for depth in section.depths))
    return [
        f"**Needles.** {section.n} pass keys, each in a context of its own; digest "
        f"{code(section.protocol_digest[:16])}. Log-probability and top-1 are those of the right answer.",
        "",
        *table(summary, 1, [_needle_row(name, arm) for name, arm in section.arms.items()]),
        "",
        "Found, by the context's tokens and the key's depth in it:",
        "",
        *table(
            grid,
            2,
            [row for name, arm in section.arms.items() for row in _grid(name, arm, section)],
        ),
        "",
    ]


def _needle_row(name: str, arm: NeedleArm) -> list[str]:
    pair = ["-"] * len(_PAIR_COLUMNS)
    if arm.comparison is not None:
        pair = _pair_cells(arm.comparison)
    return [_LABELS[name], _accuracy(arm.recall), f"{arm.logprob:.3f}", f"{arm.top1:.3f}", *pair]


def _grid(name: str, arm: NeedleArm, section: NeedleSection) -> list[list[str]]:
    found = {(cell.length, cell.depth): f"{cell.found}/{cell.trials}" for cell in arm.cells}
    return [
        [_LABELS[name], str(length), *(found[length, depth] for depth in section.depths)]
        for length in section.lengths
    ]


def _tasks(section: TasksSection) -> list[str]:
    first = next(iter(section.arms.values()))
    rows = [
        [task, metric, *(_metric(results, task, metric) for results in section.arms.values())]
        for task, metrics in first.tasks.items()
        for metric in metrics
        if "_stderr," not in metric
    ]
    limit = "" if section.limit is None else f", the first {section.limit} questions of each"
    return [
        f"**Tasks** of lm-evaluation-harness {first.harness}{limit}; the harness' standard error follows a number.",
        "",
        *table(("task", "metric", *section.arms), 2, rows),
        "",
    ]


def _metric(results: TaskResults, task: str, metric: str) -> str:
    own: Mapping[str, float] = results.tasks[task]
    error = own.get(metric.replace(",", "_stderr,", 1))
    text = f"{own[metric]:.4f}"
    return text if error is None else f"{text} ± {error:.4f}"


def _expectations(report: EvalReport) -> list[str]:
    rows = [
        [
            one.expectation,
            _LABELS[one.arm],
            one.measured,
            "met" if one.is_met else "**not met**",
            f"{one.threshold:g}",
            f"{one.found:.6g}",
        ]
        for one in report.expectations
    ]
    columns = ("expectation", "KV cache", "of", "outcome", "threshold", "found")
    return ["**Expected.**", "", *table(columns, 4, rows), ""]


def _accuracy(accuracy: Accuracy) -> str:
    return f"{accuracy.value:.4f} [{accuracy.ci_low:.4f}, {accuracy.ci_high:.4f}]"


def _pair_cells(result: PairedComparison) -> list[str]:
    return [
        f"{points(result.difference)} [{points(result.ci_low)}, {points(result.ci_high)}]",
        str(result.only_a),
        str(result.only_b),
        str(result.both_right),
        str(result.neither),
        p_value(result.p_value),
    ]
